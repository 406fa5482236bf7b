"""Loads the compiled kernels (fastkd/_cpu.so and _cuda.so, built by setup.py) and says which runs.

The rule: a CPU tensor takes the C++ kernel, a CUDA tensor the GPU kernel, where it is compiled; else the reference
runs, in plain torch on any device. `use_backend("reference")` takes the reference everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

BUILT_IN = Path(__file__).resolve().parents[1] / "_cpu.so"
BUILT_IN_CUDA = BUILT_IN.with_name("_cuda.so")
BACKENDS = ("compiled", "reference")
_backend = ["compiled"]


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


@functools.cache
def why_no_cuda() -> str | None:
    """None once the GPU kernels are loaded, else the reason why CUDA tensors take plain torch. Needs no GPU."""
    if why_not_loaded() is not None:
        return why_not_loaded()
    if not BUILT_IN_CUDA.exists():
        return "fastkd/_cuda.so is not built; `FASTKD_CUDA=1 pip install .` builds it or says what is missing"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    try:
        torch.ops.load_library(BUILT_IN_CUDA)
    except OSError as error:
        return f"fastkd/_cuda.so cannot be loaded ({error}); rebuild it with `FASTKD_CUDA=1 pip install .`"
    return None


def has_kernel(op: str, device: str = "cpu") -> bool:
    """True if fastkd::`op` is compiled for a device type, "cpu" or "cuda"."""
    if why_not_loaded() is not None or not hasattr(torch.ops.fastkd, op):
        return False
    if device == "cpu":
        return True
    return why_no_cuda() is None and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastkd::{op}", "CUDA")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context every op takes this backend: "compiled" (the rule above) or "reference".

    For tests and benchmarks; not per thread.
    Raises: ValueError for another name.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {BACKENDS}, got {name!r}; choose one")
    before = _backend[0]
    _backend[0] = name
    try:
        yield
    finally:
        _backend[0] = before


class Dispatch:
    """Which implementation an op takes; one a module, made when it is imported.

    Args:
        op: name in torch.ops.fastkd.
    """

    def __init__(self, op: str):
        self.op = op
        self.cpu, self.cuda = has_kernel(op), has_kernel(op, "cuda")

    def compiled(self, tensor: Tensor) -> bool:
        """True if the compiled op takes this tensor."""
        if _backend[0] == "reference":
            return False
        if tensor.device.type == "cuda" and not self.cuda:
            if not torch.compiler.is_compiling():
                _warn_once(self.op, why_no_cuda() or "no GPU kernel in this version")
            return False
        return self.cuda if tensor.device.type == "cuda" else self.cpu and tensor.device.type == "cpu"


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    warnings.warn(f"{op}: a CUDA tensor takes the reference in plain torch: {reason}", stacklevel=4)


def cpu_capability() -> str | None:
    """The instruction set in use: generic, avx2, avx512 or avx512_bf16; None if not built.

    FASTKD_CPU_CAPABILITY overrides it.

    Raises: RuntimeError if FASTKD_CPU_CAPABILITY names none of them or one that this CPU lacks.
    """
    return torch.ops.fastkd.cpu_capability() if has_kernel("cpu_capability") else None


def cpu_build() -> str | None:
    """How the library was built (ABI, headers, compiler, instruction sets); None if not built."""
    return torch.ops.fastkd.cpu_build() if has_kernel("cpu_build") else None
