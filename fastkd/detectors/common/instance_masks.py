"""Parts shared by CondInst and SOLOv2: masks at stride 4, dice loss, and masks at image size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastkd.types import Batch

MASK_STRIDE = 4
DICE_EPS = 1e-5
MASKS_AT_ONCE = 16  # masks held as float32 images


def aligned_upsample(maps: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling [N, C, h, w] -> [N, C, factor * h, factor * w] that preserves the positions of cell centres.

    Input cell j maps to output cell j * factor + factor // 2, like locations in the image; the border is replicated.
    """
    height, width = maps.shape[-2:]
    maps = F.pad(maps, (0, 1, 0, 1), mode="replicate")
    size = (factor * height + 1, factor * width + 1)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
    maps = F.pad(maps, (factor // 2, 0, factor // 2, 0), mode="replicate")
    return maps[..., : factor * height, : factor * width]


def coarse_masks(batch: Batch) -> Tensor:
    """Ground-truth masks [K, ceil((H - 2) / 4), ceil((W - 2) / 4)] bool, sampled at cell centres of stride 4."""
    assert batch.masks is not None  # see require_masks
    return batch.masks[:, MASK_STRIDE // 2 :: MASK_STRIDE, MASK_STRIDE // 2 :: MASK_STRIDE]


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - 2 sum(p t) / (sum p^2 + sum t^2 + 1e-5) of each mask, p = sigmoid(logits).

    Args:
        logits: [N, h, w] float32; receive gradients. Rows and columns beyond those of the targets are ignored.
        targets: [N, h', w'] bool, h' <= h, w' <= w.
    Returns: [N].
    """
    height, width = targets.shape[-2:]
    p, t = logits[:, :height, :width].sigmoid().flatten(1), targets.flatten(1).to(logits.dtype)
    return 1 - 2 * (p * t).sum(1) / (p.square().sum(1) + t.sum(1) + DICE_EPS)


def require_masks(detector: str, batch: Batch) -> None:
    """Raises: ValueError if the batch has no masks."""
    if batch.masks is None:
        raise ValueError(f"loss: batch.masks must be [K, H, W] for {detector}, got None; load the data with masks")
