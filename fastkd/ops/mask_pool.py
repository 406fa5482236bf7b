"""mask_pool: the mean of a pyramid over the cells of each object's mask (LGD with instance masks, methods 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops.checks import check_device, check_levels, check_masks
from fastkd.ops.coverage import mask_cover, pool_cover


def mask_pool_reference(levels: Sequence[Tensor], masks: Tensor, image_index: Tensor) -> Tensor:
    """Plain torch of `mask_pool`."""
    return torch.stack([pool_cover(level, mask_cover(masks, level.shape[2:]), image_index) for level in levels])


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
    check_masks("mask_pool", masks, image_index)
    check_device("mask_pool", "masks", masks, "levels", levels[0])
    return mask_pool_reference(levels, masks, image_index)
