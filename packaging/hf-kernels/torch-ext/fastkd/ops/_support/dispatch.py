"""Defines the ops' schemas and selects the Triton kernel for a CUDA tensor, the reference in plain torch for others.

In fastkd itself the library of CPU kernels defines the schemas; this kernel has none.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

BACKENDS = ("compiled", "reference")
SCHEMAS = (
    "instance_attention(Tensor queries, Tensor[] levels, Tensor? key_weight, Tensor[] row_bias, Tensor[] column_bias, "
    "Tensor[] values) -> (Tensor, Tensor, Tensor)",
    "instance_attention_backward(Tensor grad, Tensor output, Tensor normal, Tensor queries, Tensor[] levels, "
    "Tensor? key_weight, Tensor[] row_bias, Tensor[] column_bias, Tensor[] values, bool for_keys, bool for_values) "
    "-> Tensor[]",
    "attention_mass(Tensor queries, Tensor[] levels, Tensor? key_weight, Tensor[] row_bias, Tensor[] column_bias, "
    "Tensor chosen, Tensor? logsumexp, float temperature) -> Tensor[]",
)
_backend = "compiled"

for _schema in SCHEMAS:
    _name, _, _arguments = _schema.partition("(")
    torch.library.define(f"fastkd::{_name}", f"({_arguments}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context in which every op uses this backend: "compiled" (kernels where available) or "reference".

    Args:
        name: "compiled" or "reference".
    Raises: ValueError for another name.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {BACKENDS}, got {name!r}; choose one")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


class Dispatch:
    """The selection for one op.

    Args:
        op: name of the op.

    Attributes:
        registered: the op's schema is defined.
    """

    registered = True

    def __init__(self, op: str):
        self.op = op

    def compiled(self, tensor: Tensor) -> bool:
        """Whether the Triton kernel is used for this tensor."""
        return _backend == "compiled" and tensor.device.type == "cuda" and _has_triton()


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    reason = _why_no_triton()
    if reason is not None:
        _warn_once(reason)
    return reason is None


@functools.cache
def _why_no_triton() -> str | None:
    from fastkd.ops import triton

    return triton.register()


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"fastkd: CUDA tensors take the reference, in plain torch: {reason}", stacklevel=6)
