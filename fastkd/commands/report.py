"""`fastkd report`: writes one HTML page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fastkd.commands.common import OwnDetectors, say, use_detectors


def report(
    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")],
    out: Path = Path("report.html"),
    images: int = 6,
    pictures: Path | None = None,
    device: str = "cpu",
    detectors: OwnDetectors = (),
) -> None:
    """Write one HTML page about finished runs: AP and gains, curves, cost, attention, features, mistakes.

    The page is a single self-contained file.

    Args:
        runs: Run directories of fastkd train, the baseline first.
        out: The HTML file.
        images: Validation images to show; 0 for none.
        pictures: Folder to which every picture is also written as a PNG file.
        device: Device for the networks of the attention and feature pictures: cpu, cuda or cuda:N.
        detectors: Class of one's own that the runs name; its code is imported only if you name it here, too.
    """
    use_detectors(detectors)
    for run in runs:
        if not run.is_dir():
            raise ValueError(f"RUNS must be existing run directories, got {run}")
    if not runs:
        raise ValueError("RUNS must name at least one run directory, got none")

    from fastkd.report import write_report
    from fastkd.training.methods import kinds

    path = write_report(list(runs), out, images=images, picture_dir=pictures, device=device, methods=kinds())
    say(f"report written to {path}")
