"""Triton kernels of the attention ops. Importing this package does not import Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def register() -> str | None:
    """Register the kernels as the CUDA implementation of the ops `_OPS` in torch.ops.fastkd.

    The CPU library must be loaded, as it defines the schemas. Kernels are compiled at the first call on a CUDA tensor.

    Returns: None if they are registered, else the reason why not.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` brings the attention kernels for CUDA"
    missing = [name for name in _OPS if not hasattr(torch.ops.fastkd, name)]
    if missing:
        return f"the library of CPU kernels, which defines fastkd::{missing[0]}, is not loaded; run `make build`"
    from fastkd.ops.triton import attention_backward, attention_forward, attention_mass

    launches: tuple[Callable[..., Any], ...] = (
        attention_forward.instance_attention,
        attention_backward.instance_attention_backward,
        attention_mass.attention_mass,
    )
    for name, launch in zip(_OPS, launches, strict=True):
        torch.library.register_kernel(f"fastkd::{name}", "cuda", launch)
    return None


def why_not_compiled() -> str | None:
    """None if Triton finds the C compiler with which it builds the launcher of a kernel, else what is missing."""
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "Triton needs a C compiler at the first call, and neither gcc nor clang is on PATH; install one or set CC"


_OPS = ("instance_attention", "instance_attention_backward", "attention_mass")
