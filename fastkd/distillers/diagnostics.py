"""Where a method's weights lie: overlaps of boxes with the cells of a pyramid (methods 9)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.distillers.protocol import Ratio
from fastkd.types import Batch


def cell_overlap(boxes: Tensor, padded_size: tuple[int, int], level_size: Sequence[int]) -> Tensor:
    """The share of each cell's area that lies inside each box.

    Args:
        boxes: [K, 4] xyxy in pixels of the padded batch.
        padded_size: (H, W), pixels.
        level_size: (H_l, W_l).
    Returns: [K, H_l, W_l] float32.
    """
    x1, y1, x2, y2 = boxes.detach().float().unbind(1)

    def axis(low: Tensor, high: Tensor, cells: int, length: int) -> Tensor:
        """[K, cells]: length of each interval inside each cell, in cells."""
        edge = torch.arange(cells, device=boxes.device, dtype=torch.float32)
        low, high = low[:, None] * (cells / length), high[:, None] * (cells / length)
        return (torch.minimum(high, edge + 1) - torch.maximum(low, edge)).clamp(min=0)

    rows, columns = axis(y1, y2, level_size[0], padded_size[0]), axis(x1, x2, level_size[1], padded_size[1])
    return rows[:, :, None] * columns[:, None, :]


def share_inside_boxes(weights: Sequence[Tensor], batch: Batch) -> dict[str, Ratio]:
    """The share of the weights inside the boxes, and the share there if every cell of the images had the same weight.

    A cell counts with the share of its area that lies inside the box covering most of it.

    Args:
        weights: L tensors [B, H_l, W_l] >= 0.
        batch: images and boxes.
    """
    image_boxes = torch.nn.functional.pad(batch.image_sizes.flip(1).to(batch.boxes.device).float(), (2, 0))
    inside, total, covered, cells = (batch.boxes.new_zeros((), dtype=torch.float64) for _ in range(4))
    for level in weights:
        overlap = cell_overlap(batch.boxes, batch.padded_size, level.shape[1:])
        index = batch.image_index[:, None, None].expand_as(overlap)
        cover = overlap.new_zeros(level.shape).scatter_reduce(0, index, overlap, "amax")  # [B, H_l, W_l]
        inside, total = inside + (level.float() * cover).sum(), total + level.float().sum()
        covered = covered + cover.sum()
        cells = cells + cell_overlap(image_boxes, batch.padded_size, level.shape[1:]).sum()
    return {"inside_boxes": (inside, total), "inside_if_even": (covered, cells)}
