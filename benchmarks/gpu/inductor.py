"""Code generation of torch.compile for a GPU without a GPU: Inductor runs on fake CUDA tensors.

Dynamo, autograd, the partition into forward and backward graph, all passes, the scheduler's fusion and the code
generation run as on a GPU; only driver queries are replaced, with the properties of an H100. Nothing is compiled or
run. The text of each generated wrapper lists its launches, call by call.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._dynamo import device_interface
from torch._inductor import compile_fx, config, graph, scheduler
from torch._inductor.fx_passes import joint_graph
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CARD = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
)

# Autograd queries the CUDA hooks, and they the driver, whether a device has a context. These return false.
HOOKS = """
#include <ATen/detail/CUDAHooksInterface.h>
struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};
extern "C" void use_hooks() {
  static Hooks ours;
  auto* theirs = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(theirs) = *reinterpret_cast<void**>(static_cast<at::CUDAHooksInterface*>(&ours));
}
"""


@functools.cache
def replace_hooks() -> None:
    """Replace torch's CUDA hooks by hooks without a context; CUDA cannot be used in this process afterwards.

    Raises: RuntimeError if there is a GPU, or torch is not built for CUDA; CalledProcessError without a compiler.
    """
    if torch.cuda.is_available() or torch.version.cuda is None:
        raise RuntimeError("gpu_inductor: torch must be a CUDA build and see no GPU; set CUDA_VISIBLE_DEVICES= before")
    package = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "hooks.cpp"), Path(folder, "hooks.so")
        source.write_text(HOOKS, encoding="utf-8")
        command = ["c++", "-std=c++20", "-shared", "-fPIC", f"-I{package / 'include'}", source, "-o", library]
        subprocess.run([*command, f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"], check=True)
        ctypes.CDLL(str(library)).use_hooks()
    torch._C._ensureCUDADeviceGuardSet()


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention as torch decomposes it for the memory-efficient kernel; torch itself would query
    the GPU to choose."""
    if attn_mask is not None:
        padding = -attn_mask.shape[-1] % 8  # rows must be aligned to 16 bytes
        padded = torch.nn.functional.pad(attn_mask, (0, padding))[..., : attn_mask.shape[-1]]
        attn_mask = padded.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


class _OnHost(TorchDispatchMode):
    """Creates tensors on the CPU instead of on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs)


class _Written(BaseException):
    """Carries the wrapper's text; raised where Inductor would compile and load it."""


def _write(lowered: graph.GraphLowering) -> None:
    raise _Written(lowered.codegen()[0].value)


class Wrappers:
    """A backend of torch.compile that records Inductor's wrappers and runs the graphs on fake tensors.

    Attributes:
        found: (whether it is the backward graph, text) of each graph.
    """

    def __init__(self):
        self.found: list[tuple[bool, str]] = []

    def __call__(self, module: nn.Module, inputs: Any) -> Callable[..., Any]:
        return compile_fx.compile_fx(module, inputs, inner_compile=self._compile)

    def _compile(self, module: nn.Module, inputs: Any, **options: Any) -> Callable[..., Any]:
        kept = torch.fx.GraphModule(module, copy.deepcopy(module.graph))
        try:
            compile_fx.compile_fx_inner(module, inputs, **options)
        except _Written as text:
            self.found.append((bool(options.get("is_backward")), str(text)))
        else:
            raise RuntimeError("gpu_inductor: Inductor wrote no wrapper")

        def run(arguments: list[Any]) -> Any:
            return kept(*arguments)

        run._boxed_call = True
        return run


@contextlib.contextmanager
def fake_card() -> Iterator[FakeTensorMode]:
    """Context with fake tensors in which "cuda" is an H100 for code generation; use with `Wrappers`."""
    replace_hooks()
    fold = joint_graph.UniformValueConstantFolder.run

    def fold_on_host(*arguments, **options):  # values of small constants are folded on the CPU
        with _OnHost():
            return fold(*arguments, **options)

    cuda = device_interface.CudaInterface
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (cuda, "get_device_properties", staticmethod(lambda device=None: CARD)),
            (cuda, "get_compute_capability", staticmethod(lambda device=None: 90)),
            (torch.cuda, "get_device_properties", lambda device=None: CARD),
            (cuda, "is_bf16_supported", staticmethod(lambda including_emulation=False: True)),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.nn.functional, "scaled_dot_product_attention", _attend),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.utils._triton, "triton_hash_with_backend", lambda: "none"),
            (scheduler, "has_triton", lambda: True),
            (joint_graph.UniformValueConstantFolder, "run", fold_on_host),
            (graph.GraphLowering, "compile_to_module", _write),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(device_interface.caching_worker_device_properties, {"cuda": [CARD]}))
        stack.enter_context(mock.patch.dict(device_interface.caching_worker_current_devices, {"cuda": 0}))
        stack.enter_context(config.patch(fx_graph_cache=False, compile_threads=1))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
