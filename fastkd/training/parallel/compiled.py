"""torch.compile of a training step: which functions are compiled, and what keeps their graphs few.

Compiled are the student's features, the modules of its head, the frozen teacher's features, and a method's forward. Not
compiled is what depends on values or on Python numbers of the batch: the assignment of targets and the losses of a few
positive ones, and what a method prepares from counts and seeds.

Sizes that differ from batch to batch (boxes, queries) are dynamic from the first graph on. Image sizes are fixed in the
first graph and dynamic from the second size on, so that training on one size has the faster static graphs and training
on many has two graphs of each function. A phase that stops gradients or batch statistics adds one to those it concerns.
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

# fields of Batch and of what methods prepare: the dimension that counts boxes or queries
COUNTED = {
    **dict.fromkeys(("boxes", "labels", "image_index", "masks", "mask_crops", "real_index"), 0),
    **dict.fromkeys(("valid", "real", "mass_mask", "noise"), 1),
    "weights": 2,
}


# Inductor's way to make one launch of several kernels that do not depend on each other: the casts of weights, the same
# step of all levels. torch has it off, as experimental; on a CPU there is nothing to save.
COMBINED = {"combo_kernels": True, "combo_kernel_allow_mixed_sizes": 2, "combo_kernel_max_num_nodes": 64}


def require_compiler(device: torch.device) -> None:
    """Checks that Inductor, which torch.compile generates its code with, can work for a device.

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
def compiler_settings(enabled: bool) -> Iterator[None]:
    """Within the context DDP leaves the graphs whole; without torch.compile nothing changes.

    They are parts of the step, so that the exchange of gradients overlaps with the backward pass between them; torch
    would split them at the borders of DDP's buckets.
    """
    with torch._dynamo.config.patch(optimize_ddp=False) if enabled else contextlib.nullcontext():
        yield


class Regions:
    """Calls the functions of a step, compiled or as they are.

    A compiled function is one graph (anything else raises) and takes the modules it uses as arguments: nothing is
    wrapped, so state dicts keep their names, and copies of the modules share the graphs.

    Args:
        enabled: whether to compile at all.
        backend: of torch.compile; "aot_eager" makes the same graphs without a compiler, for tests.
    """

    def __init__(self, enabled: bool = False, backend: str = "inductor"):
        self.enabled, self.backend = enabled, backend
        self._compiled: dict[str, Callable[..., Any]] = {}

    def __call__(self, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """function(*arguments, **options); `name` says which graphs are to be shared."""
        if not self.enabled:
            return function(*arguments, **options)
        if name not in self._compiled:
            assert isinstance(function, types.FunctionType)
            self._compiled[name] = torch.compile(
                _with_own_code(function),
                fullgraph=True,
                backend=self.backend,
                options=self._options(_device_type(arguments)),
            )
        # Eager's backward pass runs outside of autocast: what a method computes in float32 stays float32 there, which
        # torch.compile would cast as it casts the forward pass around it.
        config = torch._functorch.config
        with config.patch(_known(config, {"backward_pass_autocast": "off"})):
            return self._compiled[name](*arguments, **options)

    def _options(self, device_type: str) -> dict[str, Any] | None:
        """Inductor's options: few launches on a GPU, and free counts of boxes; those that this release of torch knows.

        Layouts that Inductor chooses for convolutions reach the graph of the backward pass as numbers, and with them
        the counts: one graph a count. Strides of what is kept for backward, one of them a count, it cannot sort; taken
        as they are it need not.
        """
        if self.backend != "inductor":
            return None
        import torch._inductor.config as inductor

        wanted: dict[str, Any] = {"layout_optimization": False, "strict_output_strides": True}
        if device_type == "cuda":
            wanted |= COMBINED
        return _known(inductor, wanted)

    def fix_batch(self, tensors: Any) -> Any:
        """A tensor or several; the first size is fixed in every graph: a batch size, of which a run has one or two."""
        if self.enabled:
            for tensor in tensors if isinstance(tensors, (list, tuple)) else (tensors,):
                torch._dynamo.mark_static(tensor, 0)
        return tensors

    def free_counts(self, value: Any) -> Any:
        """A batch, or what a method prepared of it; the sizes that count boxes or queries are free in every graph."""
        for name, dim in COUNTED.items():
            tensor = getattr(value, name, None)
            if self.enabled and tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)  # "maybe": of 0 and of 1 there are graphs of their own
        return value

    @contextlib.contextmanager
    def inside(self, detector: Detector) -> Iterator[None]:
        """Within the context the forward of the detector's `tensor_parts` is compiled, whoever calls them."""
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
    """A module's own forward in a region."""

    def __init__(self, regions: Regions, name: str, module: nn.Module):
        self.regions, self.name, self.module = regions, name, module

    def __call__(self, *arguments: Any) -> Any:
        for argument in arguments:
            self.regions.fix_batch(argument)
        return self.regions(f"part {self.name}", _forward, self.module, *arguments)


def _device_type(arguments: Any) -> str:
    """Where the first tensor among the arguments is."""
    flat = (one for argument in arguments for one in (argument if isinstance(argument, (list, tuple)) else [argument]))
    return next((one.device.type for one in flat if isinstance(one, Tensor)), "cpu")


def _forward(module: nn.Module, *arguments: Any) -> Any:
    return type(module).forward(module, *arguments)


def _known(config: types.ModuleType, wanted: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that this release of torch has."""
    return {name: value for name, value in wanted.items() if hasattr(config, name)}


def _with_own_code(function: types.FunctionType) -> types.FunctionType:
    """The function with a code object of its own: torch.compile counts and limits the graphs of a code object."""
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own
