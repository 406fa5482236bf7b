"""A linear applied to every cell of a pyramid, all levels in one kernel: ICD's projections of values on a GPU.

out[l][b, o, y, x] = sum_c weight[o, c] levels[l][b, c, y, x] + bias[o]

Not public: fastkd.distillers.decoder calls it where it pays, which is in half types on a GPU. On a CPU products
level by level are as fast, and torch has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.registration import register_with_backward

HALVES = (torch.bfloat16, torch.float16)

# Defined here and not by a library of kernels: the only ones are in Triton (fastkd/ops/triton/projection.py).
_LIBRARY = torch.library.Library("fastkd", "FRAGMENT")
_LIBRARY.define("project_levels(Tensor[] levels, Tensor weight, Tensor bias) -> Tensor[]")
_LIBRARY.define(
    "project_levels_backward(Tensor[] grads, Tensor[] levels, Tensor weight, bool for_levels, bool for_weight, "
    "bool for_bias) -> Tensor[]"
)
_DISPATCH = Dispatch("project_levels")


def kernel_takes(levels: Sequence[Tensor]) -> bool:
    """Whether these levels are the kernel's."""
    return levels[0].device.type == "cuda" and levels[0].dtype in HALVES and _DISPATCH.compiled(levels[0])


def project_levels(levels: Sequence[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    """The linear of all cells.

    Args:
        levels: L tensors [B, C, H_l, W_l], bfloat16 or float16; receive gradients.
        weight: [O, C] of their dtype; receives gradients, which are added up in float32 over all levels.
        bias: [O] likewise.
    Returns: L tensors [B, O, H_l, W_l], all in `order_of` the levels.
    """
    return torch.ops.fastkd.project_levels(list(levels), weight, bias)


def project_levels_reference(levels: Sequence[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Plain torch of `project_levels`."""
    cells = [level.permute(0, 2, 3, 1) for level in levels]  # [B, H, W, C]
    return [torch.nn.functional.linear(each, weight, bias).permute(0, 3, 1, 2) for each in cells]


def order_of(levels: Sequence[Tensor]) -> torch.memory_format:
    """The memory order of what the op makes: channels-last where all levels are, else contiguous."""
    last = all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)
    last = last and not all(level.is_contiguous() for level in levels)
    return torch.channels_last if last else torch.contiguous_format


def empty_pyramid(levels: Sequence[Tensor], channels: int) -> list[Tensor]:
    """Room for a pyramid of other channels."""
    order = order_of(levels)
    sizes = [(level.shape[0], channels, *level.shape[2:]) for level in levels]
    return [
        torch.empty(size, dtype=level.dtype, device=level.device, memory_format=order)
        for size, level in zip(sizes, levels, strict=True)
    ]


def _forward_fake(levels, weight, bias) -> list[Tensor]:
    return empty_pyramid(levels, weight.shape[0])


def _backward_fake(grads, levels, weight, for_levels, for_weight, for_bias) -> list[Tensor]:
    made = empty_pyramid(levels, weight.shape[1]) if for_levels else []
    made += [torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)] if for_weight else []
    return made + ([torch.empty(weight.shape[:1], dtype=weight.dtype, device=weight.device)] if for_bias else [])


def _forward_on_cpu(levels, weight, bias) -> list[Tensor]:
    results = project_levels_reference(levels, weight, bias)
    return [room.copy_(one) for room, one in zip(empty_pyramid(levels, weight.shape[0]), results, strict=True)]


def _backward_on_cpu(grads, levels, weight, for_levels, for_weight, for_bias) -> list[Tensor]:
    wide, cells = ([one.float().flatten(2) for one in pyramid] for pyramid in (grads, levels))
    found = []
    if for_levels:
        turned = weight.float().t().expand(len(levels[0]), -1, -1)
        rooms = empty_pyramid(levels, weight.shape[1])
        found = [room.copy_((turned @ grad).view(room.shape)) for room, grad in zip(rooms, wide)]
    if for_weight:
        found.append(sum((grad @ x.transpose(1, 2)).sum(0) for grad, x in zip(wide, cells)).to(weight.dtype))
    if for_bias:
        found.append(sum(grad.sum((0, 2)) for grad in wide).to(weight.dtype))
    return found


def _setup_context(ctx, inputs, output) -> None:
    levels, weight, _ = inputs
    ctx.save_for_backward(weight, *levels)


def _backward(ctx, grads: list[Tensor]):
    weight, *levels = ctx.saved_tensors
    for_levels, for_weight, for_bias = any(ctx.needs_input_grad[0]), *ctx.needs_input_grad[1:]
    found = torch.ops.fastkd.project_levels_backward(list(grads), levels, weight, for_levels, for_weight, for_bias)
    grad_levels = [found.pop(0) for _ in levels] if for_levels else [None] * len(levels)
    return grad_levels, found.pop(0) if for_weight else None, found.pop(0) if for_bias else None


torch.library.impl(_LIBRARY, "project_levels", "CPU")(_forward_on_cpu)
torch.library.impl(_LIBRARY, "project_levels_backward", "CPU")(_backward_on_cpu)
register_with_backward(
    "project_levels",
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
    backward_fake=_backward_fake,
)
