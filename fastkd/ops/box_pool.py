"""box_pool: the mean of a pyramid over the cells each box covers (LGD, methods 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops.checks import check_boxes, check_device, check_levels, check_size
from fastkd.ops.coverage import box_cover, pool_cover


def box_pool_reference(
    levels: Sequence[Tensor], boxes: Tensor, image_index: Tensor, image_size: tuple[int, int]
) -> Tensor:
    """Plain torch of `box_pool`: one matrix of covered cells a level."""
    pooled = [pool_cover(level, box_cover(boxes, image_size, level.shape[2:]), image_index) for level in levels]
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
    check_boxes("box_pool", boxes, image_index)
    check_size("box_pool", "image_size", image_size)
    check_device("box_pool", "boxes", boxes, "levels", levels[0])
    return box_pool_reference(levels, boxes, image_index, image_size)
