"""The memory order of pyramid levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(level: Tensor) -> bool:
    """Whether a level [B, C, H, W] is channels-last and not also contiguous."""
    return not level.is_contiguous() and level.is_contiguous(memory_format=torch.channels_last)


def order_of(levels: Sequence[Tensor]) -> torch.memory_format:
    """Memory format for a pyramid computed from these levels: channels-last if all of them are, else contiguous."""
    last = all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)
    last = last and not all(level.is_contiguous() for level in levels)
    return torch.channels_last if last else torch.contiguous_format


def empty_pyramid(levels: Sequence[Tensor], channels: int) -> list[Tensor]:
    """An uninitialised pyramid [B, channels, H_l, W_l] with the memory format, dtype and device of the levels."""
    order = order_of(levels)
    sizes = [(level.shape[0], channels, *level.shape[2:]) for level in levels]
    return [
        torch.empty(size, dtype=level.dtype, device=level.device, memory_format=order)
        for size, level in zip(sizes, levels, strict=True)
    ]
