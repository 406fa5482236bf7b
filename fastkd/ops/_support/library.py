"""Loads the compiled kernels: fastkd/_cpu.so and _cuda.so (built by setup.py), and the Triton kernels.

fastkd/ops/_support/dispatch.py selects among them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path

import torch

BUILT_IN = Path(__file__).resolve().parents[2] / "_cpu.so"
BUILT_IN_CUDA = BUILT_IN.with_name("_cuda.so")
TRITON_OPS = ("instance_attention", "attention_mass")  # all others have their GPU kernel in _cuda.so


def cpu_library() -> Path:
    """Path of the CPU library: FASTKD_CPU_LIBRARY if set (for instance a CMake build), else the one in the package."""
    return Path(os.environ.get("FASTKD_CPU_LIBRARY") or BUILT_IN)


@functools.cache
def why_not_loaded() -> str | None:
    """None if the CPU library is loaded, else the reason, as text for `fastkd info`.

    Raises: ImportError if the library exists but cannot be loaded, or FASTKD_CPU_LIBRARY names no file: a library that
        was built or requested must not be ignored silently.
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
    """None if fastkd/_cuda.so is loaded, else the reason. Needs no GPU and no driver."""
    if why_not_loaded() is not None:  # it defines the schemas
        return why_not_loaded()
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch and rebuild fastkd"
    if not BUILT_IN_CUDA.exists():
        return "fastkd/_cuda.so is not built; `FASTKD_CUDA=1 pip install .` builds it or says what is missing"
    try:
        torch.ops.load_library(BUILT_IN_CUDA)
    except OSError as error:
        return f"fastkd/_cuda.so cannot be loaded ({error}); rebuild it with `FASTKD_CUDA=1 pip install .`"
    return None


@functools.cache
def why_no_triton() -> str | None:
    """None if the Triton kernels are registered, else the reason. Compiles nothing."""
    if importlib.util.find_spec("fastkd.ops.triton") is None:
        return "no kernel in this version"
    from fastkd.ops import triton

    return triton.register()


def why_triton_cannot_compile() -> str | None:
    """What Triton lacks for compiling the registered kernels at their first call, None if nothing is known to."""
    from fastkd.ops import triton

    return triton.why_not_compiled()


def why_no_kernel(op: str, device: str = "cpu") -> str | None:
    """None if fastkd::`op` and its backward have kernels for a device type, "cpu" or "cuda", else the reason."""
    if why_not_loaded() is not None:
        return why_not_loaded()
    names = [name for name in (op, f"{op}_backward") if hasattr(torch.ops.fastkd, name)]
    if device == "cuda" and names:
        reason = why_no_triton() if op in TRITON_OPS else why_no_cuda()
        if reason is not None:
            return reason
        names = [name for name in names if not _has_cuda_kernel(name)]
        return f"no kernel of {' and '.join(names)} in this version" if names else None
    return None if names else "no kernel in this version"


def has_kernel(op: str, device: str = "cpu") -> bool:
    """True if fastkd::`op` is compiled for a device type, "cpu" or "cuda"."""
    return why_no_kernel(op, device) is None


def _has_cuda_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastkd::{name}", "CUDA")


def cpu_capability() -> str | None:
    """The instruction set in use: generic, avx2, avx512 or avx512_bf16; None if not built.

    FASTKD_CPU_CAPABILITY overrides it.

    Raises: RuntimeError if FASTKD_CPU_CAPABILITY is not one of these or not supported by this CPU.
    """
    return torch.ops.fastkd.cpu_capability() if has_kernel("cpu_capability") else None


def cpu_build() -> str | None:
    """How the library was built (ABI, headers, compiler, instruction sets); None if not built."""
    return torch.ops.fastkd.cpu_build() if has_kernel("cpu_build") else None


def cuda_build() -> str | None:
    """How the GPU kernels were built (machine code and PTX, compiler); None if not built."""
    return torch.ops.fastkd.cuda_build() if why_no_cuda() is None else None


def why_unsupported(build: str, capability: tuple[int, int]) -> str | None:
    """None if a build of the GPU kernels runs on a card, else the reason.

    Machine code runs on later cards of the same major version; the driver compiles PTX for any later card.

    Args:
        build: result of `cuda_build`, with the targets sm_XY and compute_XY.
        capability: (major, minor) of the card.
    """
    major, minor = capability
    for kind, number in re.findall(r"\b(sm|compute)_(\d+)", build):
        built = int(number[:-1]), int(number[-1])
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return None
    targets = " ".join(re.findall(r"\b(?:sm|compute)_\d+", build))
    return (
        f"this GPU is sm_{major}{minor}, the kernels are built for {targets}; "
        f'rebuild with `TORCH_CUDA_ARCH_LIST="{major}.{minor}" FASTKD_CUDA=1 pip install .`'
    )


@functools.cache
def why_not_on_card(op: str, index: int) -> str | None:
    """None if a kernel of this op runs on a card, else the reason."""
    reason = why_no_kernel(op, "cuda")
    if reason is None and op not in TRITON_OPS and torch.cuda.is_available():
        return why_unsupported(cuda_build() or "", torch.cuda.get_device_capability(index))
    return reason
