"""box_pool: the mean of a pyramid over the cells each box covers (LGD, methods 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops._support.checks import (
    check_boxes,
    check_device,
    check_kernel_dtype,
    check_levels,
    check_object_values,
    check_size,
)
from fastkd.ops._support.coverage import box_cover, full_precision, pool_cover
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.layout import is_channels_last
from fastkd.ops._support.pool_paint import flat, new_levels, new_pooled
from fastkd.ops._support.registration import register_with_backward

_DISPATCH = Dispatch("box_pool")


def box_pool_reference(
    levels: Sequence[Tensor], boxes: Tensor, image_index: Tensor, image_size: tuple[int, int]
) -> Tensor:
    """Plain torch of `box_pool`: one coverage matrix per level."""
    pooled = [pool_cover(level, box_cover(boxes, image_size, level.shape[2:]), image_index) for level in levels]
    with full_precision(levels[0]):  # autocast cannot stack half types other than its own
        return torch.stack(pooled)


def box_pool(levels: Sequence[Tensor], boxes: Tensor, image_index: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Mean of every pyramid level over the cells each box covers.

    out[l, k] = mean of levels[l][image_index[k], :, y, x] over y1 * H_l / H <= y <= y2 * H_l / H, likewise x; 0 where
    no cell is covered. The comparison is made in float32.

    Args:
        levels: L tensors [B, C, H_l, W_l], floating point; receive gradients.
        boxes: [K, 4] xyxy in pixels of the padded batch, clamped to [0, W - 1] x [0, H - 1]; no gradient.
        image_index: [K] int64 in [0, B).
        image_size: (H, W) of the padded batch, pixels.
    Returns: [L, K, C], dtype of levels.
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree.
    Source: LGD (Zhang et al., AAAI 2022), sparse label-appearance encoding.
    """
    check_levels("box_pool", "levels", levels)
    check_kernel_dtype("box_pool", "levels", levels[0])
    check_boxes("box_pool", boxes, image_index)
    check_size("box_pool", "image_size", image_size)
    check_device("box_pool", "boxes", boxes, "levels", levels[0])
    check_object_values("box_pool", image_index, levels[0].shape[0], boxes)
    if _DISPATCH.compiled(levels[0]):
        return torch.ops.fastkd.box_pool(list(levels), boxes.detach(), image_index, list(image_size))
    return box_pool_reference(levels, boxes, image_index, image_size)


def _fake(levels: list[Tensor], boxes: Tensor, image_index: Tensor, image_size: list[int]) -> Tensor:
    return new_pooled(levels, boxes.shape[0])


def _backward_fake(grad, boxes, image_index, image_size, batch_size, level_sizes, channels_last) -> list[Tensor]:
    return new_levels(grad, batch_size, level_sizes, channels_last)


def _setup_context(ctx, inputs, output) -> None:
    levels, boxes, image_index, ctx.image_size = inputs
    ctx.batch_size = levels[0].shape[0]
    ctx.level_sizes = flat([level.shape[2:] for level in levels])
    ctx.channels_last = [is_channels_last(level) for level in levels]
    ctx.save_for_backward(boxes, image_index)


def _backward(ctx, grad: Tensor):
    boxes, image_index = ctx.saved_tensors
    gradients = torch.ops.fastkd.box_pool_backward(
        grad, boxes, image_index, ctx.image_size, ctx.batch_size, ctx.level_sizes, ctx.channels_last
    )
    return gradients, None, None, None


if _DISPATCH.registered:
    register_with_backward(
        "box_pool", fake=_fake, setup_context=_setup_context, backward=_backward, backward_fake=_backward_fake
    )
