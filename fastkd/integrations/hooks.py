"""Forward hooks that are dropped when the host's model is copied or pickled."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

_ONLY_DDP = (
    "of the wrappers only DistributedDataParallel is supported, put around the model after attaching; "
    "DataParallel, FSDP and DeepSpeed are not"
)


class Hook:
    """A callable whose deep copy and pickle are no-ops.

    An EMA made by deepcopy must not distil, and a pickled model must load without fastkd. Both get
    `nullcontext().__exit__` instead: it takes any arguments and returns None, like a forward hook without effect.

    Args:
        function: called as function(module, arguments, ...).
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module.training and getattr(module, "_is_replica", False):
            raise RuntimeError(f"attach: the attached model must be trained itself, not by DataParallel; {_ONLY_DDP}")
        return self.function(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__

    def __reduce__(self):
        return getattr, (contextlib.nullcontext(), "__exit__")


def check_unattached(model: nn.Module) -> None:
    """Raises ValueError if hooks of an attachment are on the model or inside of it."""
    for part in model.modules():
        if any(isinstance(hook, Hook) for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())):
            raise ValueError(
                f"attach: this {type(model).__name__} has a distillation attached already; call its detach() first"
            )


_WRAPPERS = (
    "OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule",
    "DeepSpeedEngine",
)  # fmt: skip


def wrapper_of(model: nn.Module) -> str | None:
    """The kind of wrapper around a model, subclasses included; None for a plain model."""
    names = [base.__name__ for base in type(model).__mro__]
    known = next((name for name in _WRAPPERS if name in names), None)
    if known is None and isinstance(getattr(model, "module", None), nn.Module):
        return type(model).__name__
    return known


def check_plain(model: nn.Module) -> None:
    """Raises ValueError for a model that is already compiled or wrapped."""
    kind, name = wrapper_of(model), type(model).__name__
    if kind == "OptimizedModule":
        raise ValueError(
            "attach: model must be the plain model, got one from torch.compile; attach first, then compile: "
            "kd = attach(model, ...); model = torch.compile(model)"
        )
    if kind == "DistributedDataParallel":
        raise ValueError(
            f"attach: model must be the plain model, got one wrapped in {name}; attach first, then wrap it: "
            f"kd = attach(model, ...); model = {name}(model); or attach to its .module"
        )
    if kind is not None:
        raise ValueError(f"attach: model must be the plain model, got one wrapped in {name}; {_ONLY_DDP}")
    if model._compiled_call_impl is not None:
        raise ValueError(
            "attach: model must not be compiled yet, got one after model.compile(); attach first, then compile"
        )


def check_trained(trained: nn.Module, attached: nn.Module) -> None:
    """Checks what a trainer trains, for a host's callback.

    Args:
        trained: the trainer's model, possibly compiled or wrapped.
        attached: the model of the attachment.
    Raises: ValueError unless `attached` is a part of `trained`, plain, compiled or in DistributedDataParallel.
    """
    inner: Any = trained
    while (kind := wrapper_of(inner)) in ("OptimizedModule", "DistributedDataParallel"):
        inner = inner._orig_mod if kind == "OptimizedModule" else inner.module
    if kind is not None:
        raise ValueError(f"callback: the trainer must not wrap its model in {type(inner).__name__}; {_ONLY_DDP}")
    if not any(part is attached for part in inner.modules()):
        raise ValueError(
            f"callback: the trainer must train the attached {type(attached).__name__}, got another "
            f"{type(inner).__name__}; attach to the trainer's model, after the trainer is built"
        )


def warn_of_fresh_method(updates: int, resumed: int, missing: str) -> None:
    """Warns if a resumed run has no state of the method.

    Args:
        updates: updates of the method's modules so far.
        resumed: the host's step at which the run begins.
        missing: what was not found.
    """
    if resumed and not updates:
        warnings.warn(
            f"fastkd: the run resumes at step {resumed}, but {missing}: the method starts anew. If its state was saved "
            "elsewhere, call kd.load(<file>) before training",
            stacklevel=3,
        )


def host_version(package: str) -> str:
    """Name and version of an imported package, for error messages."""
    return f"{package} {getattr(sys.modules.get(package), '__version__', 'of unknown version')}"


def no_levels(model: nn.Module, part: str, package: str) -> RuntimeError:
    """The error for a forward pass in which the hook on a part of the model did not see the pyramid."""
    return RuntimeError(
        f"attach: the forward pass of {type(model).__name__} must give a pyramid at {part}, got none "
        f"({host_version(package)}); attach after the last change to the model, or use fastkd.integrations.HostStep if "
        "this version computes its pyramid elsewhere"
    )
