"""The memory order of pyramid levels."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(level: Tensor) -> bool:
    """Whether a level [B, C, H, W] lies channels-last in memory and not contiguous; of both orders at once, False."""
    return not level.is_contiguous() and level.is_contiguous(memory_format=torch.channels_last)
