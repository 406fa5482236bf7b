"""Checks for a GPU that the kernels run on: `python -m benchmarks.gpu.card`; exit status 1 and one line if not.

--card checks only the GPU, before anything is built; --sanitizer also checks for compute-sanitizer.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

from fastkd.ops._support import library


def why_no_card() -> str | None:
    """None if torch sees a GPU, else the reason in one line."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch; run this on a machine with an NVIDIA GPU and its driver"
    return None


def why_no_kernels() -> str | None:
    """None if the GPU kernels are built and run on this GPU, else the reason."""
    if library.why_no_cuda() is not None:
        return library.why_no_cuda()
    return library.why_unsupported(library.cuda_build() or "", torch.cuda.get_device_capability())


def sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, else in CUDA_HOME, else in /usr/local/cuda."""
    homes = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, homes)]))


def main(arguments: list[str]) -> int:
    """Print the GPU's name, or with --sanitizer the path of compute-sanitizer; else the reason, to stderr."""
    found, reason = "", why_no_card()
    if reason is None:
        found, reason = torch.cuda.get_device_name(), None if "--card" in arguments else why_no_kernels()
    if "--sanitizer" in arguments and reason is None:
        found = sanitizer() or ""
        reason = None if found else "compute-sanitizer is not on PATH nor in CUDA_HOME; install the CUDA toolkit's"
    print(found if reason is None else f"gpu: {reason}", file=sys.stdout if reason is None else sys.stderr)
    return int(reason is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
