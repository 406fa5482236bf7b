"""Forward hooks of which copies and pickles of the host's model keep nothing."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class Hook:
    """A callable whose deep copy and pickle do nothing.

    An EMA by deep copy must not distil, and a pickled model must load where fastkd is not installed: both get
    `nullcontext().__exit__`, which takes any arguments and returns None, as a forward hook that changes nothing.

    Args:
        function: called as function(module, arguments, ...).
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__

    def __reduce__(self):
        return getattr, (contextlib.nullcontext(), "__exit__")


def claim(model: nn.Module, owner: object) -> None:
    """Notes who is attached to a model.

    Raises: ValueError if somebody is already.
    """
    if _ATTACHED.get(model) is not None:
        raise ValueError(
            f"attach: this {type(model).__name__} has a distillation attached already; call its detach() first"
        )
    _ATTACHED[model] = owner


def release(model: nn.Module) -> None:
    """The model is free again."""
    _ATTACHED.pop(model, None)


def check_plain(model: nn.Module) -> None:
    """Raises ValueError for a model that was compiled or wrapped before."""
    kind = type(model).__name__
    if kind == "OptimizedModule":
        raise ValueError(
            "attach: model must be the plain model, got one from torch.compile; attach first, then compile: "
            "kd = attach(model, ...); model = torch.compile(model)"
        )
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"):
        raise ValueError(
            f"attach: model must be the plain model, got one wrapped in {kind}; attach first, then wrap it: "
            f"kd = attach(model, ...); model = {kind}(model)"
        )
    if model._compiled_call_impl is not None:
        raise ValueError(
            "attach: model must not be compiled yet, got one after model.compile(); attach first, then compile"
        )
