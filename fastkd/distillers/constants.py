"""Tables that no step changes, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def constant(make: Callable[..., Any]) -> Callable[..., Any]:
    """Remembers what `make` makes of its (hashable) arguments: tensors that no step changes.

    Not while torch.compile, torch.export or a fake mode trace: their tensors hold nothing.
    """
    remembered = functools.lru_cache(maxsize=32)(make)

    @functools.wraps(make)
    def get(*arguments):
        if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE):
            return make(*arguments)
        return remembered(*arguments)

    return get


@constant
def numbers(count: int, device: torch.device) -> Tensor:
    """[count] int64: 0, 1, ..."""
    return torch.arange(count, device=device)
