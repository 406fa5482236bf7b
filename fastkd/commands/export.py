"""`fastkd export`: writes a trained detector as safetensors and ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fastkd.commands.common import OwnDetectors, find_checkpoint, image_size, say, use_detectors
from fastkd.files import write_json


def export(
    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")],
    out: Path = Path("export"),
    onnx: bool = True,
    height: int | None = None,
    width: int | None = None,
    dynamic: bool = True,
    detectors: OwnDetectors = (),
) -> None:
    """Write a trained detector, without teacher and distiller, as safetensors and as ONNX.

    The ONNX graph maps normalised images to the feature pyramid and the raw outputs of the head; model.json describes
    them. The graph is run in onnxruntime and compared with torch; the largest difference is printed.

    Args:
        checkpoint: Run directory of fastkd train, or a detector's .safetensors file.
        out: Folder for model.safetensors, model.onnx and model.json.
        onnx: Write the ONNX graph too (needs pip install 'fastkd[onnx]').
        height: Height of the example image, pixels. Default: from the evaluation size of the run.
        width: Width of the example image, pixels. Default: from the evaluation size of the run.
        dynamic: Make batch size, height and width dynamic.
        detectors: Class of one's own that the checkpoint names; its code is imported only if you name it here, too.
    """
    use_detectors(detectors)
    checkpoint = find_checkpoint(checkpoint)

    from fastkd import export as exporting
    from fastkd.detectors import load_detector, save_detector

    if onnx:
        exporting.require_onnx()
    detector, class_names = load_detector(checkpoint)
    size = image_size(checkpoint, None, None)
    coarsest = max(detector.strides)
    default = -(-(size.short_side or 512) // coarsest) * coarsest
    example = (default if height is None else height, default if width is None else width)
    if onnx:
        exporting.check_graph(detector)
        exporting.check_size(detector, example)
    out.mkdir(parents=True, exist_ok=True)
    save_detector(detector, out / "model.safetensors", class_names)
    say(f"{out / 'model.safetensors'}: {sum(p.numel() for p in detector.parameters()):,} parameters")
    reports = []
    if onnx:
        say("tracing the graph and comparing it with torch: up to a minute for large detectors")
        reports = exporting.export_onnx(detector, out, size=example, dynamic=dynamic)
    for report in reports:
        shapes = ", ".join(" x ".join(map(str, shape)) for shape in report.tried)
        say(
            f"{report.path}: largest difference between onnxruntime and torch {report.difference:.2e} "
            f"({report.relative_difference:.1e} of an output's largest value), compared on {shapes}"
        )
    write_json(out / "model.json", exporting.description(detector, class_names, reports))
    say(f"{out / 'model.json'}: classes, normalisation, anchors, names of inputs and outputs")
