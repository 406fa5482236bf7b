"""mask_paint: embeddings painted on the cells of each object's mask (LGD with instance masks, methods 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops._support.checks import (
    check_batch_size,
    check_device,
    check_embeddings,
    check_kernel_dtype,
    check_masks,
    check_object_values,
)
from fastkd.ops._support.coverage import mask_cover, paint_cover
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.pool_paint import flat, new_levels, new_pooled
from fastkd.ops._support.registration import register_with_backward

_DISPATCH = Dispatch("mask_paint")


def mask_paint_reference(
    embeddings: Tensor, masks: Tensor, image_index: Tensor, batch_size: int, level_sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Plain torch of `mask_paint`."""
    return [
        paint_cover(embedding, mask_cover(masks, size), image_index, batch_size)
        for embedding, size in zip(embeddings.unbind(0), level_sizes, strict=True)
    ]


def mask_paint(
    embeddings: Tensor, masks: Tensor, image_index: Tensor, batch_size: int, level_sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Pyramid whose cells sum the embeddings of the objects whose mask, resized by nearest neighbour, covers them.

    Args:
        embeddings: [L, K, C], floating point; receives gradients.
        masks: [K, H, W] bool over the padded batch.
        image_index: [K] int64 in [0, batch_size).
        batch_size: B.
        level_sizes: L pairs (H_l, W_l).
    Returns: L tensors [B, C, H_l, W_l], dtype of embeddings, channels-last.
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree.
    Source: LGD (Zhang et al., AAAI 2022), intra-object knowledge mapper with instance masks.
    """
    check_masks("mask_paint", masks, image_index)
    check_batch_size("mask_paint", batch_size)
    check_embeddings("mask_paint", embeddings, masks.shape[0], level_sizes)
    check_kernel_dtype("mask_paint", "embeddings", embeddings)
    check_device("mask_paint", "masks", masks, "embeddings", embeddings)
    check_object_values("mask_paint", image_index, batch_size)
    if _DISPATCH.compiled(embeddings) and level_sizes:
        return torch.ops.fastkd.mask_paint(embeddings, masks, image_index, batch_size, flat(level_sizes))
    return mask_paint_reference(embeddings, masks, image_index, batch_size, level_sizes)


def _fake(embeddings, masks, image_index, batch_size, level_sizes) -> list[Tensor]:
    return new_levels(embeddings, batch_size, level_sizes, [True] * (len(level_sizes) // 2))


def _backward_fake(grads: list[Tensor], masks: Tensor, image_index: Tensor) -> Tensor:
    return new_pooled(grads, masks.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    _, masks, image_index, _, _ = inputs
    ctx.save_for_backward(masks, image_index)


def _backward(ctx, grads: list[Tensor]):
    masks, image_index = ctx.saved_tensors
    gradient = torch.ops.fastkd.mask_paint_backward(grads, masks, image_index)
    return gradient, None, None, None, None


if _DISPATCH.registered:
    register_with_backward(
        "mask_paint", fake=_fake, setup_context=_setup_context, backward=_backward, backward_fake=_backward_fake
    )
