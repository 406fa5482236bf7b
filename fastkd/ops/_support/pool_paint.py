"""Helpers of box_pool, mask_pool, box_paint and mask_paint: level sizes for the kernels, empty results."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def flat(level_sizes: Sequence[tuple[int, int]]) -> list[int]:
    """(H_l, W_l) of the levels as H_0, W_0, H_1, W_1, ..., the form the kernels take."""
    return [side for size in level_sizes for side in size]


def new_levels(
    values: Tensor, batch_size: int, level_sizes: Sequence[int], channels_last: Sequence[bool]
) -> list[Tensor]:
    """Empty levels [B, C, H_l, W_l] for values [L, K, C], each in its memory format."""
    levels, channels = [], values.shape[2]
    for rows, columns, last in zip(level_sizes[::2], level_sizes[1::2], channels_last, strict=True):
        shape = (batch_size, rows, columns, channels) if last else (batch_size, channels, rows, columns)
        level = values.new_empty(shape)
        levels.append(level.permute(0, 3, 1, 2) if last else level)
    return levels


def new_pooled(levels: Sequence[Tensor], objects: int) -> Tensor:
    """Empty [L, K, C] for levels [B, C, H_l, W_l]."""
    return levels[0].new_empty((len(levels), objects, levels[0].shape[1]))
