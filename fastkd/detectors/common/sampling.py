"""Random samples of anchors and proposals, drawn from one seed per image."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.types import Batch


def image_generators(batch: Batch) -> list[torch.Generator]:
    """One CPU generator per image, from batch.seeds, so that samples do not depend on the batch or process.

    If the batch has no seeds, they are drawn from torch's global generator.

    Raises: ValueError if there are seeds but not one for each image.
    """
    seeds = batch.seeds or torch.randint(2**62, (len(batch),)).tolist()
    if len(seeds) != len(batch):
        raise ValueError(f"image_generators: batch.seeds must hold {len(batch)} integers, got {len(seeds)}")
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_keys(generators: list[torch.Generator], counts: list[int], device: torch.device) -> Tensor:
    """Sorting keys [B, max count]: counts[b] uniform numbers in [0, 1) from generators[b], then 2 as padding."""
    keys = torch.full((len(counts), max(counts)), 2.0)
    for row, generator, count in zip(keys, generators, counts, strict=True):
        row[:count] = torch.rand(count, generator=generator)
    return keys.to(device, non_blocking=True)


def sample_balanced(labels: Tensor, keys: Tensor, size: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Sample up to `size` entries per image: at most positive_fraction of them positive, the rest negative.

    As torchvision's BalancedPositiveNegativeSampler; the entries with the smallest keys are taken.

    Args:
        labels: [B, N] integer; > 0 positive, 0 negative, < 0 never taken.
        keys: [B, N] in [0, 1), 2 for padding.
    Returns: indices [B, M] and a mask [B, M] of those taken.
    """
    positive_limit = int(size * positive_fraction)
    positives, is_positive = _smallest(keys, labels > 0, positive_limit)
    negatives, is_negative = _smallest(keys, labels == 0, size)
    left = size - is_positive.sum(1, keepdim=True)
    is_negative &= torch.arange(is_negative.shape[1], device=keys.device) < left
    return torch.cat([positives, negatives], 1), torch.cat([is_positive, is_negative], 1)


def _smallest(keys: Tensor, allowed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    value, index = keys.masked_fill(~allowed, 2.0).topk(min(count, keys.shape[1]), dim=1, largest=False, sorted=True)
    return index, value < 1
