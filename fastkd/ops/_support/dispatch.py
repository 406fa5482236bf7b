"""Selects the implementation of an op: the compiled kernel for the tensor's device, or the reference if there is none.

CPU tensors use the C++ kernels of fastkd/_cpu.so, CUDA tensors the kernels of fastkd/_cuda.so or the Triton kernels.
Without a kernel for the device the reference in plain torch runs; for CUDA tensors a warning, once per op, gives the
reason. `use_backend("reference")` selects the reference everywhere.
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
    """Context in which every op uses this backend: "compiled" (kernels where available) or "reference".

    For tests and benchmarks. The setting is global to all threads; torch.compile recompiles when it changes.

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
    """The selection for one op, created when its module is imported.

    Args:
        op: name in torch.ops.fastkd.

    Attributes:
        registered: whether the CPU library is loaded and defines the op's schema.
    """

    def __init__(self, op: str):
        self.op = op
        self.registered = library.has_kernel(op)

    def compiled(self, tensor: Tensor) -> bool:
        """Whether the compiled op is used for this tensor."""
        if _backend == "reference":
            return False
        if tensor.device.type == "cuda":
            return _has_cuda(self.op, tensor.device.index or 0) and self.registered
        return self.registered and tensor.device.type == "cpu"


@torch.compiler.assume_constant_result  # loading and warning happen at trace time
def _has_cuda(op: str, index: int) -> bool:
    reason = library.why_not_on_card(op, index)
    if reason is not None:
        _warn_once(op, reason)
    return reason is None


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    warnings.warn(f"{op}: a CUDA tensor takes the reference, in plain torch: {reason}", stacklevel=5)
