"""RoI align over a pyramid: torchvision's kernel on a GPU; on a CPU, where that is slow, a gather of table rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's multi-scale RoI align on P2 .. P5, two samples along each side of a bin.

    The strides are fixed, not inferred from the first batch. On a CPU, `align_on_cpu` computes the same values. The
    aligned form (detectron2) uses torchvision's kernel on both devices.

    Args:
        size: side of the pooled maps.
        canonical_size: side in pixels of proposals pooled from P4 (half that size: P3, and so on).
        aligned: cell centres at half pixels and one sample per cell of a bin.
    """

    def __init__(self, size: int, canonical_size: int, aligned: bool = False):
        super().__init__(["0", "1", "2", "3"], size, sampling_ratio=2, canonical_scale=canonical_size)
        self.size, self.aligned = size, aligned
        self.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        self.map_levels = LevelMapper(2, 5, canonical_scale=canonical_size)

    def forward(self, pyramid: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """Pooled maps [R, C, size, size] of B tensors of boxes [R_b, 4], concatenated over images."""
        levels = pyramid[: len(self.scales)]
        if self.aligned:
            return align_adaptively(levels, self.scales, boxes, self.map_levels(boxes), self.size)
        if levels[0].is_cpu:
            return align_on_cpu(levels, self.scales, boxes, self.map_levels(boxes), self.size)
        return super().forward({str(level): x for level, x in enumerate(levels)}, boxes, [])


def align_adaptively(
    levels: list[Tensor], scales: list[float], boxes: list[Tensor], chosen: Tensor, size: int
) -> Tensor:
    """RoI align in its aligned form, ceil(bin size) samples along each side of a bin.

    Args: as of `align_on_cpu`.
    Returns: [R, C, size, size] float32.
    """
    counts = torch.tensor([len(image_boxes) for image_boxes in boxes], device=chosen.device)
    image = torch.repeat_interleave(counts)[:, None]
    rois = torch.cat([image.float(), torch.cat(boxes).float()], 1)
    pooled = levels[0].new_zeros(len(rois), levels[0].shape[1], size, size, dtype=torch.float32)
    for number, (level, scale) in enumerate(zip(levels, scales, strict=True)):
        rows = (chosen == number).nonzero()[:, 0]
        aligned_rois = roi_align(level.float(), rois[rows], size, scale, sampling_ratio=-1, aligned=True)
        pooled = pooled.index_put((rows,), aligned_rois)
    return pooled


def align_on_cpu(levels: list[Tensor], scales: list[float], boxes: list[Tensor], chosen: Tensor, size: int) -> Tensor:
    """RoI align; each bin is a weighted sum of 16 rows of a table [cells of all levels, C].

    A bin is the mean of 2 x 2 bilinear samples of 2 x 2 cells each. Bilinear sampling is separable, so its indices are
    outer sums and its weights outer products over 4 rows and 4 columns.

    Args:
        levels: pyramid levels [B, C, H_l, W_l]; receive gradients.
        scales: 1 / stride of each level.
        boxes: B tensors [R_b, 4] xyxy in pixels.
        chosen: [R] level of each box.
    Returns: [R, C, size, size] float32.
    """
    rois = torch.cat(boxes).float() * torch.tensor(scales)[chosen][:, None]
    image = torch.repeat_interleave(torch.tensor([len(image_boxes) for image_boxes in boxes]))
    shape = torch.tensor([level.shape[-2:] for level in levels])[chosen]  # [R, 2]
    cells = torch.tensor([len(level) * level.shape[-2] * level.shape[-1] for level in levels])
    first = (cells.cumsum(0) - cells)[chosen] + image * shape.prod(1)  # table row of cell (0, 0) of the image
    y, y_weight = _axis(rois[:, 1], rois[:, 3], shape[:, 0], size)  # [R, size, 4]
    x, x_weight = _axis(rois[:, 0], rois[:, 2], shape[:, 1], size)
    y = first[:, None, None] + y * shape[:, 1, None, None]
    rows = (y[:, :, None, :, None] + x[:, None, :, None, :]).int().view(-1, 16)  # [R * size * size, 16]
    weights = ((y_weight / 4)[:, :, None, :, None] * x_weight[:, None, :, None, :]).view(-1, 16)
    table = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2).float() for level in levels])
    pooled = _WeightedRows.apply(table, rows, weights)
    return pooled.view(len(rois), size, size, table.shape[1]).permute(0, 3, 1, 2)


def _axis(start: Tensor, end: Tensor, cells: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cells [R, size, 4] that the two samples of each bin read along one axis, and their weights."""
    step = (end - start).clamp(min=1)[:, None] / (2 * size)
    position = start[:, None] + (torch.arange(2 * size) + 0.5) * step  # [R, 2 * size]
    last = (cells[:, None] - 1).float()
    inside = (position >= -1) & (position <= last + 1)
    position = position.clamp(min=0).minimum(last)
    low = position.floor()
    fraction = position - low
    index = torch.stack([low, (low + 1).minimum(last)], -1).long()
    weight = torch.stack([1 - fraction, fraction], -1) * inside[..., None]
    return index.view(len(start), size, 4), weight.view(len(start), size, 4)


class _WeightedRows(torch.autograd.Function):
    """out[n] = sum_j weights[n, j] * table[rows[n, j]], by embedding_bag; the backward pass sorts the rows."""

    @staticmethod
    def forward(ctx, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.cells = len(table)
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, weights = ctx.saved_tensors
        ordered, order = rows.flatten().sort()
        starts = torch.searchsorted(ordered, torch.arange(ctx.cells, dtype=ordered.dtype))
        readers = order // rows.shape[1]
        weights = weights.flatten()[order]
        return F.embedding_bag(readers, grad.contiguous(), starts, per_sample_weights=weights, mode="sum"), None, None
