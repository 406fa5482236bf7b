"""Prints PREDICTED times of the ops on a GPU: `python -m benchmarks.gpu.predictions`. Needs no GPU.

First the bounds of benchmarks/gpu/roofline.py, then the fraction of them that the kernels' traffic
(benchmarks/gpu/traffic.py) allows on an H100.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from benchmarks.gpu import roofline, traffic


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("images", "height", "width", "channels", "heads", "boxes", "queries", "real", "anchors"):
        parser.add_argument(f"--{name}", type=int, default=getattr(roofline.PUBLISHED, name))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    chosen = vars(parser.parse_args(arguments))
    half = chosen.pop("dtype") == "bfloat16"
    shape = dataclasses.replace(roofline.PUBLISHED, **chosen)
    print("\n".join([*roofline.table(shape, half), "", *traffic.aims(shape, roofline.H100, 2 if half else 4)]))


if __name__ == "__main__":
    main()
