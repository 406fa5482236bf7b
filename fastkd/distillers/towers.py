"""Convolutions that all levels of a pyramid share, as one node of autograd.

A weight that each of five levels uses apart gets five gradients, added up one by one and parameter by parameter. Here
the backward pass goes level by level through all convolutions and adds each level's gradients in one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd.ops._support.coverage import full_precision

EPS = 1e-5  # of the group norms


def plain_tower(levels: Sequence[Tensor], convs: Sequence[nn.Conv2d], *, recompute: bool = False) -> list[Tensor]:
    """3x3 convolutions with ReLU between them, on every level.

    Args:
        levels: L tensors [B, C, H_l, W_l]; receive gradients.
        convs: 3x3 with padding 1; they receive gradients.
        recompute: keep nothing but the levels for the backward pass, which computes the rest again.
    Returns: L tensors [B, C_out, H_l, W_l], under autocast in its dtype.
    """
    return _apply(levels, None, convs, norm=False, recompute=recompute)


def normed_tower(
    levels: Sequence[Tensor],
    shared: Tensor | None,
    convs: Sequence[nn.Conv2d],
    *,
    order: torch.memory_format = torch.contiguous_format,
    recompute: bool = False,
) -> list[Tensor]:
    """ReLU of levels + shared, then 3x3 convolutions, a GroupNorm of one group after each, with ReLU between.

    Args:
        levels, convs, recompute: as of `plain_tower`.
        shared: [L, B, C], added to all cells, or None; receives gradients.
        order: memory order of what is computed, best that of the gradients to come.
    Returns: L tensors [B, C_out, H_l, W_l], under autocast in its dtype.
    """
    return _apply(levels, shared, convs, norm=True, recompute=recompute, order=order)


def share(levels: Sequence[Tensor], users: int) -> list[list[Tensor]]:
    """The levels for several users, whose gradients are added up in one call for all levels."""
    if not any(level.requires_grad for level in levels):
        return [list(levels)] * users
    views = _Share.apply(users, *levels)
    return [list(views[start : start + len(levels)]) for start in range(0, len(views), len(levels))]


def _apply(
    levels, shared, convs, *, norm: bool, recompute: bool, order: torch.memory_format = torch.contiguous_format
) -> list[Tensor]:
    weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs]
    kind = levels[0].device.type
    if torch.is_autocast_enabled(kind) and weights[0].dtype != torch.float64:  # one cast for all levels
        dtype = torch.get_autocast_dtype(kind)
        weights, biases = [weight.to(dtype) for weight in weights], [bias.to(dtype) for bias in biases]
        levels, shared = [level.to(dtype) for level in levels], shared if shared is None else shared.to(dtype)
    with full_precision(levels[0]):
        return list(_Tower.apply((norm, order, recompute, len(convs)), shared, *weights, *biases, *levels))


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, users: int, *levels: Tensor):
        ctx.levels = len(levels)
        ctx.set_materialize_grads(False)
        return tuple(level.view_as(level) for _ in range(users) for level in levels)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        first, *others = (grads[start : start + ctx.levels] for start in range(0, len(grads), ctx.levels))
        total = list(first)
        for more in others:
            both = [index for index, pair in enumerate(zip(total, more)) if None not in pair]
            sums = torch._foreach_add([total[i] for i in both], [more[i] for i in both]) if both else []
            total = [one if other is None else other for one, other in zip(total, more)]
            for index, value in zip(both, sums):
                total[index] = value
        return None, *total


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.conv2d(x, weight, bias, padding=1)


def _normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images, channels, rows, columns = x.shape
    return torch.native_group_norm(x, None, None, images, channels, rows * columns, 1, EPS)


def _begin(levels: Sequence[Tensor], shared: Tensor | None, order: torch.memory_format) -> list[Tensor]:
    """ReLU of levels + shared, new tensors in that order."""
    if shared is None:
        moved = torch._foreach_clamp_min(list(levels), 0.0)
    else:
        moved = torch._foreach_add(list(levels), [row[:, :, None, None] for row in shared.unbind()])
        torch._foreach_clamp_min_(moved, 0.0)
    return [level.contiguous(memory_format=order) for level in moved]


def _forward(levels: list[Tensor], weights, biases, norm: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The results, and of every level what its backward pass needs.

    Of each convolution its input, and with norms its result and the result's mean and 1 / standard deviation.
    """
    kept: list[list[Tensor]] = [[] for _ in levels]
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        made = []
        for level, own in zip(levels, kept, strict=True):
            own.append(level)
            result = _convolve(level, weight, bias)
            if norm:
                before = result
                result, mean, deviation = _normalise(before)
                own += [before, mean, deviation]
            made.append(result)
        if number + 1 < len(weights):
            torch._foreach_clamp_min_(made, 0.0)
        levels = made
    return levels, kept


def _backward(grad: Tensor, kept: list[Tensor], weights, norm: bool, mask: tuple[bool, bool]):
    """The gradient of a level's first input, and those of weights, then biases.

    Args:
        mask: whether the input, and whether the parameters, want a gradient.
    """
    for_weights, for_biases, stride = [], [], 4 if norm else 1
    for number in reversed(range(len(weights))):
        x, *normed = kept[number * stride : (number + 1) * stride]
        if norm:
            before, mean, deviation = normed
            order = torch.channels_last if not before.is_contiguous() else torch.contiguous_format
            grad = grad.contiguous(memory_format=order)
            images, channels, rows, columns = before.shape
            sizes = (images, channels, rows * columns, 1)
            grad = torch.ops.aten.native_group_norm_backward(
                grad, before, mean, deviation, None, *sizes, [True, False, False]
            )[0]
        wanted = [number > 0 or mask[0], mask[1], mask[1]]
        weight = weights[number]
        grad, for_weight, for_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
        )
        for_weights.insert(0, for_weight)
        for_biases.insert(0, for_bias)
        if grad is not None and (number > 0 or norm):  # the first input is a ReLU's with norms alone
            grad = torch.ops.aten.threshold_backward(grad, x, 0)
    return grad, [*for_weights, *for_biases]


class _Tower(torch.autograd.Function):
    """`plain_tower` or `normed_tower`; tensors: weights, biases, levels."""

    @staticmethod
    def forward(ctx, options: tuple, shared: Tensor | None, *tensors: Tensor):
        norm, order, recompute, convs = options
        weights, biases, levels = tensors[:convs], tensors[convs : 2 * convs], tensors[2 * convs :]
        results, kept = _forward(_begin(levels, shared, order) if norm else list(levels), weights, biases, norm)
        ctx.options, ctx.levels = options, len(levels)
        if recompute:
            ctx.save_for_backward(*weights, *biases, *levels, *(() if shared is None else (shared,)))
        else:
            ctx.save_for_backward(*weights, *biases, *(value for own in kept for value in own))
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        norm, order, recompute, convs = ctx.options
        weights, biases, saved = (
            ctx.saved_tensors[:convs],
            ctx.saved_tensors[convs : 2 * convs],
            ctx.saved_tensors[2 * convs :],
        )
        needs_shared, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        needs_levels = [needed or needs_shared for needed in needs[2 * convs :]]
        trains, for_levels, for_parameters = any(needs[: 2 * convs]), [], None
        for index in reversed(range(ctx.levels)):  # small levels first: half types round the sum after each
            if recompute:
                level, shared = saved[index], saved[ctx.levels] if len(saved) > ctx.levels else None
                own = None if shared is None else shared[index : index + 1]
                first = _begin([level], own, order) if norm else [level]
                kept = _forward(first, weights, biases, norm)[1][0]
            else:
                each = len(saved) // ctx.levels
                kept = list(saved[index * each : (index + 1) * each])
            grad, found = _backward(grads[index], kept, weights, norm, (needs_levels[index], trains))
            for_levels.insert(0, grad)
            if trains and for_parameters is None:
                for_parameters = found
            elif trains:
                torch._foreach_add_(for_parameters, found)
        for_shared = torch.stack([grad.sum((2, 3)) for grad in for_levels]) if needs_shared else None
        return None, for_shared, *(for_parameters or [None] * 2 * convs), *for_levels
