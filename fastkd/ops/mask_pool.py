"""mask_pool: the mean of a pyramid over the cells of each object's mask (LGD with instance masks, methods 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops._support.checks import check_device, check_kernel_dtype, check_levels, check_masks, check_object_values
from fastkd.ops._support.coverage import full_precision, mask_cover, pool_cover
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.layout import is_channels_last
from fastkd.ops._support.pool_paint import flat, new_levels, new_pooled
from fastkd.ops._support.registration import register_with_backward

_DISPATCH = Dispatch("mask_pool")


def mask_pool_reference(levels: Sequence[Tensor], masks: Tensor, image_index: Tensor) -> Tensor:
    """Plain torch of `mask_pool`."""
    pooled = [pool_cover(level, mask_cover(masks, level.shape[2:]), image_index) for level in levels]
    with full_precision(levels[0]):  # autocast cannot stack half types other than its own
        return torch.stack(pooled)


def mask_pool(levels: Sequence[Tensor], masks: Tensor, image_index: Tensor) -> Tensor:
    """Mean of every pyramid level over the cells of each object's mask, resized to the level by nearest neighbour.

    Args:
        levels: L tensors [B, C, H_l, W_l], floating point; receive gradients.
        masks: [K, H, W] bool over the padded batch.
        image_index: [K] int64 in [0, B).
    Returns: [L, K, C], dtype of levels; 0 where no cell is covered.
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree.
    Source: LGD (Zhang et al., AAAI 2022), appearance encoder with instance masks.
    """
    check_levels("mask_pool", "levels", levels)
    check_kernel_dtype("mask_pool", "levels", levels[0])
    check_masks("mask_pool", masks, image_index)
    check_device("mask_pool", "masks", masks, "levels", levels[0])
    check_object_values("mask_pool", image_index, levels[0].shape[0])
    if _DISPATCH.compiled(levels[0]):
        return torch.ops.fastkd.mask_pool(list(levels), masks, image_index)
    return mask_pool_reference(levels, masks, image_index)


def _fake(levels: list[Tensor], masks: Tensor, image_index: Tensor) -> Tensor:
    return new_pooled(levels, masks.shape[0])


def _backward_fake(grad, masks, image_index, batch_size, level_sizes, channels_last) -> list[Tensor]:
    return new_levels(grad, batch_size, level_sizes, channels_last)


def _setup_context(ctx, inputs, output) -> None:
    levels, masks, image_index = inputs
    ctx.batch_size = levels[0].shape[0]
    ctx.level_sizes = flat([level.shape[2:] for level in levels])
    ctx.channels_last = [is_channels_last(level) for level in levels]
    ctx.save_for_backward(masks, image_index)


def _backward(ctx, grad: Tensor):
    masks, image_index = ctx.saved_tensors
    gradients = torch.ops.fastkd.mask_pool_backward(
        grad, masks, image_index, ctx.batch_size, ctx.level_sizes, ctx.channels_last
    )
    return gradients, None, None


if _DISPATCH.registered:
    register_with_backward(
        "mask_pool", fake=_fake, setup_context=_setup_context, backward=_backward, backward_fake=_backward_fake
    )
