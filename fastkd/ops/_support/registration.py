"""Registers fake and autograd implementations of a compiled op fastkd::<op> and its backward fastkd::<op>_backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastkd.ops._support.layout import is_channels_last


def register(op: str, *, fake: Callable) -> None:
    """Register an op without gradient: shapes and dtypes for tracing.

    Args:
        op: name in torch.ops.fastkd.
        fake: the op's arguments -> empty results.
    """
    torch.library.register_fake(f"fastkd::{op}", fake)


def register_with_backward(
    op: str,
    *,
    fake: Callable,
    setup_context: Callable,
    backward: Callable,
    backward_fake: Callable,
    public: str | None = None,
) -> None:
    """Register an op with a gradient.

    Args:
        op: name in torch.ops.fastkd; <op>_backward must exist there as well.
        fake, backward_fake: their arguments -> empty results.
        setup_context, backward: as torch.library.register_autograd takes them; backward calls <op>_backward.
        public: name in messages, of the function of fastkd.ops that calls this op; None: the op itself.
    """
    name = f"fastkd::{op}"
    torch.library.register_fake(name, fake)
    torch.library.register_fake(f"{name}_backward", backward_fake)
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    torch.library.register_autograd(f"{name}_backward", _refuse_double_backward(public or op))


def _refuse_double_backward(op: str) -> Callable:
    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{op}: double backward is not available in the compiled kernel; use fastkd.ops.{op}_reference, "
            "which is plain torch"
        )

    return refuse


def dense_like(level: torch.Tensor) -> torch.Tensor:
    """An empty tensor like level [B, C, H, W]: channels-last if the level is, else contiguous."""
    order = torch.channels_last if is_channels_last(level) else torch.contiguous_format
    return torch.empty_like(level.contiguous(memory_format=order))
