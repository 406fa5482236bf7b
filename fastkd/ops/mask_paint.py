"""mask_paint: embeddings painted on the cells of each object's mask (LGD with instance masks, methods 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkd.ops.checks import check_device, check_embeddings, check_masks
from fastkd.ops.coverage import mask_cover, paint_cover


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
    """Pyramid whose cells sum the embeddings of the objects whose nearest-resized mask covers them.

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
    check_embeddings("mask_paint", embeddings, masks.shape[0], level_sizes)
    check_device("mask_paint", "masks", masks, "embeddings", embeddings)
    return mask_paint_reference(embeddings, masks, image_index, batch_size, level_sizes)
