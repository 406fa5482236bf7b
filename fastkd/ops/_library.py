"""Loads the compiled kernels (fastkd/_cpu.so, built by setup.py); without them every op takes its reference."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

BUILT_IN = Path(__file__).resolve().parents[1] / "_cpu.so"


def cpu_library() -> Path:
    """The library in use: FASTKD_CPU_LIBRARY where it is set (one built by CMake, say), else the one in the package."""
    return Path(os.environ.get("FASTKD_CPU_LIBRARY") or BUILT_IN)


@functools.cache
def why_not_loaded() -> str | None:
    """None once the library is loaded, else the reason why there is none, in words for `fastkd info`.

    Raises: ImportError if there is a library that cannot be loaded, or FASTKD_CPU_LIBRARY names none: what was built or
        asked for must not go missing unnoticed.
    """
    path = cpu_library()
    if path == BUILT_IN and not path.exists():
        return f"fastkd/{path.name} is not built; run `make build` or `pip install .`"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"fastkd: {path} cannot be loaded ({error}); it needs torch >= 2.10, this is {torch.__version__}: "
            "rebuild it with `make clean build` or `pip install .`, or remove it to run on plain torch"
        ) from error
    return None


def has_kernel(op: str) -> bool:
    """True if the library is loaded and brings fastkd::`op`."""
    return why_not_loaded() is None and hasattr(torch.ops.fastkd, op)


def cpu_capability() -> str | None:
    """The instruction set in use: generic, avx2, avx512 or avx512_bf16; None if not built.

    FASTKD_CPU_CAPABILITY overrides it.

    Raises: RuntimeError if FASTKD_CPU_CAPABILITY names none of them or one that this CPU lacks.
    """
    return torch.ops.fastkd.cpu_capability() if has_kernel("cpu_capability") else None


def cpu_build() -> str | None:
    """How the library was built (ABI, headers, compiler, instruction sets); None if not built."""
    return torch.ops.fastkd.cpu_build() if has_kernel("cpu_build") else None
