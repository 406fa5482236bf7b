"""torch.compile of a training step: the compiled functions, and how the number of graphs is kept small.

Compiled: the student's features, the modules of its head, the frozen teacher's features, and a method's forward. Not
compiled is code that depends on values or Python numbers of the batch: target assignment, losses over the positive
samples, and a method's `prepare`, which uses counts and seeds.

Sizes that differ from batch to batch (boxes, queries) are dynamic from the first graph on. Image sizes are static in
the first graph and dynamic from the second size on: training on one image size uses the faster static graphs, training
on several sizes compiles two graphs per function. A phase that stops gradients or batch statistics adds one graph to
each function that it affects.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.detectors import Detector

# Fields of Batch and of the results of `Distiller.prepare` -> the dimension that counts boxes or queries.
COUNTED = {
    **dict.fromkeys(("boxes", "labels", "image_index", "masks", "mask_crops", "real_index"), 0),
    **dict.fromkeys(("valid", "real", "mass_mask", "noise"), 1),
    "weights": 2,
}


# Inductor's horizontal fusion: one launch for several independent kernels (casts of weights, the same step of all
# levels). Experimental and off by default in torch; of no use on a CPU.
COMBINED = {"combo_kernels": True, "combo_kernel_allow_mixed_sizes": 2, "combo_kernel_max_num_nodes": 64}


def require_compiler(device: torch.device) -> None:
    """Checks that the compilers Inductor needs for a device are installed.

    Raises: RuntimeError naming what is missing.
    """
    import torch._inductor.config as inductor

    wanted = inductor.cpp.cxx if isinstance(inductor.cpp.cxx, (list, tuple)) else (inductor.cpp.cxx,)
    names = [name for name in wanted if name]
    if not any(shutil.which(name) for name in names):
        raise RuntimeError(
            f"compile: a C++ compiler must be installed, got none of {names} on PATH; install g++, name another one in "
            "CXX, or leave --runtime.compile off"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "compile: Triton must be installed for a GPU, got none; pip install triton, or leave --runtime.compile off"
        )


@contextlib.contextmanager
def compiler_settings(enabled: bool, several_backwards: bool = False) -> Iterator[None]:
    """Within the context DDP does not split the graphs at its bucket boundaries; no effect without torch.compile.

    Each graph covers a part of the step only, so the all-reduce still overlaps with the rest of the backward pass.

    Args:
        enabled: whether functions are compiled.
        several_backwards: allow several backward passes through one forward pass: a compiled backward pass must then
            not overwrite the tensors saved for it.
    """
    config = torch._functorch.config
    kept = _supported(config, {"donated_buffer": False}) if several_backwards else {}
    if not enabled:
        yield
        return
    with torch._dynamo.config.patch(optimize_ddp=False), config.patch(kept) if kept else contextlib.nullcontext():
        yield


class Regions:
    """Calls the functions of a step, compiled or eagerly.

    A compiled function is one full graph (a graph break raises) and takes the modules it uses as arguments. No module
    is wrapped, so state-dict keys do not change, and copies of the modules share the graphs.

    Args:
        enabled: whether to compile at all.
        backend: backend of torch.compile; "aot_eager" makes the same graphs without a compiler, for tests.
    """

    def __init__(self, enabled: bool = False, backend: str = "inductor"):
        self.enabled, self.backend = enabled, backend
        self._compiled: dict[str, Callable[..., Any]] = {}

    def __call__(self, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Returns function(*arguments, **options); calls with the same `name` share their graphs."""
        if not self.enabled:
            return function(*arguments, **options)
        if name not in self._compiled:
            assert isinstance(function, types.FunctionType)
            self._compiled[name] = torch.compile(
                _copy_function(function),
                fullgraph=True,
                backend=self.backend,
                options=self._options(_device_type(arguments)),
            )
        # The eager backward pass runs outside autocast, so that a method's float32 computations stay in float32.
        # torch.compile would by default apply the autocast of the forward pass to it.
        config = torch._functorch.config
        with config.patch(_supported(config, {"backward_pass_autocast": "off"})):
            return self._compiled[name](*arguments, **options)

    def _options(self, device_type: str) -> dict[str, Any] | None:
        """Inductor's options, as far as this release of torch has them: few launches on a GPU, dynamic box counts.

        layout_optimization would pass strides, and with them box counts, to the backward graph as constants: one graph
        for each count. Inductor cannot sort the strides of saved tensors if one of them is a symbolic count;
        strict_output_strides makes it keep their order.
        """
        if self.backend != "inductor":
            return None
        import torch._inductor.config as inductor

        wanted: dict[str, Any] = {"layout_optimization": False, "strict_output_strides": True}
        if device_type == "cuda":
            wanted |= COMBINED
        return _supported(inductor, wanted)

    def mark_batch_static(self, tensors: Any) -> Any:
        """Marks dimension 0 of a tensor or of several as static: a run has only one or two batch sizes."""
        if self.enabled:
            for tensor in tensors if isinstance(tensors, (list, tuple)) else (tensors,):
                torch._dynamo.mark_static(tensor, 0)
        return tensors

    def mark_counts_dynamic(self, value: Any) -> Any:
        """Marks the dimensions of a batch, or of a method's prepared inputs, that count boxes or queries as dynamic."""
        for name, dim in COUNTED.items():
            tensor = getattr(value, name, None)
            if self.enabled and tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)  # "maybe", since torch specialises sizes 0 and 1
        return value

    @contextlib.contextmanager
    def compiled_parts(self, detector: Detector) -> Iterator[None]:
        """Within the context every call of the detector's `tensor_parts` runs their compiled forward."""
        if not self.enabled:
            yield
            return
        modules = detector.tensor_parts()
        try:
            for name, module in modules.items():
                module.forward = _Forward(self, name, module)
            yield
        finally:
            for module in modules.values():
                del module.forward


class _Forward:
    """Calls a module's forward, compiled."""

    def __init__(self, regions: Regions, name: str, module: nn.Module):
        self.regions, self.name, self.module = regions, name, module

    def __call__(self, *arguments: Any) -> Any:
        for argument in arguments:
            self.regions.mark_batch_static(argument)
        return self.regions(f"part {self.name}", _forward, self.module, *arguments)


def _device_type(arguments: Any) -> str:
    """The device type of the first tensor among the arguments; "cpu" if there is none."""
    flat = (one for argument in arguments for one in (argument if isinstance(argument, (list, tuple)) else [argument]))
    return next((one.device.type for one in flat if isinstance(one, Tensor)), "cpu")


def _forward(module: nn.Module, *arguments: Any) -> Any:
    return type(module).forward(module, *arguments)


def _supported(config: types.ModuleType, wanted: dict[str, Any]) -> dict[str, Any]:
    """The settings that exist in this release of torch."""
    return {name: value for name, value in wanted.items() if hasattr(config, name)}


def _copy_function(function: types.FunctionType) -> types.FunctionType:
    """A copy of the function with a new code object, because torch.compile limits the graphs per code object."""
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own
