"""box_paint: embeddings painted on the cells each box covers, the adjoint of a box sum (LGD, methods 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops._support.checks import (
    check_batch_size,
    check_boxes,
    check_device,
    check_embeddings,
    check_kernel_dtype,
    check_object_values,
    check_size,
)
from fastkd.ops._support.coverage import box_cover, paint_cover
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.pool_paint import flat, new_levels, new_pooled
from fastkd.ops._support.registration import register_with_backward

_DISPATCH = Dispatch("box_paint")


def box_paint_reference(
    embeddings: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    image_size: tuple[int, int],
    batch_size: int,
    level_sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Plain torch of `box_paint`."""
    return [
        paint_cover(embedding, box_cover(boxes, image_size, size), image_index, batch_size)
        for embedding, size in zip(embeddings.unbind(0), level_sizes, strict=True)
    ]


def box_paint(
    embeddings: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    image_size: tuple[int, int],
    batch_size: int,
    level_sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Pyramid whose cells sum the embeddings of the boxes that cover them.

    out[l][b, :, y, x] = sum of embeddings[l, k] over the k with image_index[k] = b whose box covers (y, x), as in
    `box_pool`.

    Args:
        embeddings: [L, K, C], floating point; receives gradients.
        boxes: [K, 4] xyxy in pixels of the padded batch, clamped to [0, W - 1] x [0, H - 1]; no gradient.
        image_index: [K] int64 in [0, batch_size).
        image_size: (H, W) of the padded batch, pixels.
        batch_size: B.
        level_sizes: L pairs (H_l, W_l).
    Returns: L tensors [B, C, H_l, W_l], dtype of embeddings, channels-last.
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree.
    Source: LGD (Zhang et al., AAAI 2022), intra-object knowledge mapper.
    """
    check_boxes("box_paint", boxes, image_index)
    check_size("box_paint", "image_size", image_size)
    check_batch_size("box_paint", batch_size)
    check_embeddings("box_paint", embeddings, boxes.shape[0], level_sizes)
    check_kernel_dtype("box_paint", "embeddings", embeddings)
    check_device("box_paint", "boxes", boxes, "embeddings", embeddings)
    check_object_values("box_paint", image_index, batch_size, boxes)
    if _DISPATCH.compiled(embeddings) and level_sizes:
        return torch.ops.fastkd.box_paint(
            embeddings, boxes.detach(), image_index, list(image_size), batch_size, flat(level_sizes)
        )
    return box_paint_reference(embeddings, boxes, image_index, image_size, batch_size, level_sizes)


def _fake(embeddings, boxes, image_index, image_size, batch_size, level_sizes) -> list[Tensor]:
    return new_levels(embeddings, batch_size, level_sizes, [True] * (len(level_sizes) // 2))


def _backward_fake(grads: list[Tensor], boxes: Tensor, image_index: Tensor, image_size: list[int]) -> Tensor:
    return new_pooled(grads, boxes.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    _, boxes, image_index, ctx.image_size, _, _ = inputs
    ctx.save_for_backward(boxes, image_index)


def _backward(ctx, grads: list[Tensor]):
    boxes, image_index = ctx.saved_tensors
    gradient = torch.ops.fastkd.box_paint_backward(grads, boxes, image_index, ctx.image_size)
    return gradient, None, None, None, None, None


if _DISPATCH.registered:
    register_with_backward(
        "box_paint", fake=_fake, setup_context=_setup_context, backward=_backward, backward_fake=_backward_fake
    )
