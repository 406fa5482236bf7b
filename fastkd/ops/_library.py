"""Loads the compiled kernels (fastkd/_cpu.so, built by setup.py); without them every op takes its plain-torch reference."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

CPU_LIBRARY = Path(__file__).resolve().parents[1] / "_cpu.so"


@functools.cache
def why_not_loaded() -> str | None:
    """None once the library is loaded, else the reason why there is none, in words for `fastkd info`.

    Raises: ImportError if the library is there but cannot be loaded: a broken build must not go unnoticed.
    """
    if not CPU_LIBRARY.exists():
        return f"{CPU_LIBRARY.name} is not built; run `make build` or `pip install .`"
    try:
        torch.ops.load_library(CPU_LIBRARY)
    except OSError as error:
        raise ImportError(
            f"fastkd: {CPU_LIBRARY} cannot be loaded ({error}); it needs torch >= 2.10, this is {torch.__version__}: "
            "rebuild it with `make clean build` or `pip install .`, or delete it to run on plain torch"
        ) from error
    return None


def has_kernel(op: str) -> bool:
    """True if the library is loaded and brings fastkd::`op`."""
    return why_not_loaded() is None and hasattr(torch.ops.fastkd, op)


def cpu_capability() -> str | None:
    """The instruction set the kernels run: generic, avx2 or avx512 (FASTKD_CPU_CAPABILITY overrides); None if not built.

    Raises: RuntimeError if FASTKD_CPU_CAPABILITY names none of them or one that this CPU lacks.
    """
    return torch.ops.fastkd.cpu_capability() if has_kernel("cpu_capability") else None
