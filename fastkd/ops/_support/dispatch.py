"""Which implementation an op takes: the compiled kernel of the tensor's device where there is one, else the reference.

A CPU tensor takes the C++ kernel of fastkd/_cpu.so, a CUDA tensor the kernel of fastkd/_cuda.so or the Triton kernel.
Where none is compiled for the device the reference runs, in plain torch; for a CUDA tensor a warning says why, once an
op. `use_backend("reference")` takes the reference everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.ops._support import library

BACKENDS = ("compiled", "reference")
_backend = "compiled"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context every op takes this backend: "compiled" (kernels where there are any) or "reference".

    For tests and benchmarks. One setting for all threads; what torch.compile made is compiled anew under another one.

    Args:
        name: "compiled" or "reference".
    Raises: ValueError for another name.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {BACKENDS}, got {name!r}; choose one")
    before = _backend
    _backend = name
    try:
        yield
    finally:
        _backend = before


class Dispatch:
    """The rule above for one op, made when its module is imported.

    Args:
        op: name in torch.ops.fastkd.

    Attributes:
        registered: the CPU library brings the op, with its schema: without it there is nothing to register.
    """

    def __init__(self, op: str):
        self.op = op
        self.registered = library.has_kernel(op)

    def compiled(self, tensor: Tensor) -> bool:
        """True if the compiled op takes this tensor."""
        if _backend == "reference":
            return False
        if tensor.device.type == "cuda":
            return _has_cuda(self.op, tensor.device.index or 0) and self.registered
        return self.registered and tensor.device.type == "cpu"


@torch.compiler.assume_constant_result  # loading and warning are done while tracing, not traced
def _has_cuda(op: str, index: int) -> bool:
    reason = library.why_not_on_card(op, index)
    if reason is not None:
        _warn_once(op, reason)
    return reason is None


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    warnings.warn(f"{op}: a CUDA tensor takes the reference, in plain torch: {reason}", stacklevel=5)
