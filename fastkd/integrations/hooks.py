"""Forward hooks that are dropped when the host's model is copied or pickled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn


class Hook:
    """A callable whose deep copy and pickle are no-ops.

    An EMA made by deepcopy must not distil, and a pickled model must load without fastkd. Both get
    `nullcontext().__exit__` instead: it takes any arguments and returns None, like a forward hook without effect.

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


def check_unattached(model: nn.Module) -> None:
    """Raises ValueError if hooks of an attachment are on the model or inside of it."""
    for part in model.modules():
        if any(isinstance(hook, Hook) for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())):
            raise ValueError(
                f"attach: this {type(model).__name__} has a distillation attached already; call its detach() first"
            )


def check_plain(model: nn.Module) -> None:
    """Raises ValueError for a model that is already compiled or wrapped."""
    kind = type(model).__name__
    if kind == "OptimizedModule":
        raise ValueError(
            "attach: model must be the plain model, got one from torch.compile; attach first, then compile: "
            "kd = attach(model, ...); model = torch.compile(model)"
        )
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"):
        raise ValueError(
            f"attach: model must be the plain model, got one wrapped in {kind}; attach first, then wrap it: "
            f"kd = attach(model, ...); model = {kind}(model); or attach to its .module"
        )
    if model._compiled_call_impl is not None:
        raise ValueError(
            "attach: model must not be compiled yet, got one after model.compile(); attach first, then compile"
        )
