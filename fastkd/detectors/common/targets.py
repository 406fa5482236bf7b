"""Matching of anchors to ground truth for a whole batch at once, without a loop over images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.boxes import box_area, box_intersection, box_iou
from fastkd.ops._support.normalizer import global_mean
from fastkd.types import Batch

BACKGROUND, IGNORE = -1, -2  # BELOW_LOW_THRESHOLD and BETWEEN_THRESHOLDS of torchvision's Matcher
MAX_PAIRS = 1 << 24  # (anchor, box) pairs compared at a time: 64 MiB per float32 temporary


class PaddedBoxes(NamedTuple):
    """Ground truth padded to K = max(1, most boxes of an image): boxes [B, K, 4]; labels, valid [B, K]."""

    boxes: Tensor
    labels: Tensor
    valid: Tensor

    @staticmethod
    def of(batch: Batch) -> PaddedBoxes:
        """The ground truth of `batch`, padded with invalid boxes (0, 0, 1, 1)."""
        device, rows = batch.boxes.device, max(max(batch.counts, default=0), 1)
        starts = torch.tensor(batch.counts).cumsum(0) - torch.tensor(batch.counts)
        column = torch.arange(len(batch.boxes), device=device) - starts.to(device)[batch.image_index]
        boxes = torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).repeat(len(batch), rows, 1)
        labels = torch.zeros(len(batch), rows, dtype=torch.int64, device=device)
        valid = torch.zeros(len(batch), rows, dtype=torch.bool, device=device)
        boxes[batch.image_index, column] = batch.boxes.float()
        labels[batch.image_index, column] = batch.labels
        valid[batch.image_index, column] = True
        return PaddedBoxes(boxes, labels, valid)

    def images(self, rows: slice) -> PaddedBoxes:
        """The ground truth of a slice of the images."""
        return PaddedBoxes(self.boxes[rows], self.labels[rows], self.valid[rows])


def match_anchors(truth: PaddedBoxes, anchors: Tensor, low: float, high: float, *, keep_best: bool) -> Tensor:
    """torchvision's Matcher for a whole batch.

    An anchor is matched to the box of highest IoU if that is at least `high`; below `low` it is background, in between
    it is ignored. With `keep_best`, the anchors with the highest IoU for some box (ties included) are matched to their
    best box at any IoU. Unlike in torchvision, a box that overlaps no anchor matches none (there: all anchors).

    Args:
        truth: ground truth of B images.
        anchors: [A, 4], the same for all images, or [B, A, 4].
    Returns: [B, A] int64, the row of `truth` or BACKGROUND or IGNORE.
    """
    step = max(1, MAX_PAIRS // max(1, truth.boxes.shape[1] * anchors.shape[-2]))
    parts = []
    for start in range(0, len(truth.boxes), step):
        rows = slice(start, start + step)
        part = anchors if anchors.dim() == 2 else anchors[rows]
        parts.append(_match(truth.images(rows), part, low, high, keep_best))
    return torch.cat(parts)


def _match(truth: PaddedBoxes, anchors: Tensor, low: float, high: float, keep_best: bool) -> Tensor:
    iou = box_iou(truth.boxes[:, :, None], anchors.unsqueeze(-3))  # [b, K, A]
    iou.masked_fill_(~truth.valid[..., None], -1.0)
    value, best = iou.max(dim=1)
    matched = torch.where(value >= high, best, torch.where(value >= low, IGNORE, BACKGROUND))
    if keep_best:
        highest = iou.amax(dim=2, keepdim=True)  # [b, K, 1]
        highest = highest.masked_fill(highest <= 0, 2.0)  # no anchor has IoU 2
        matched = torch.where((iou == highest).any(dim=1), best, matched)
    return matched


def inside_ignored(batch: Batch, anchors: Tensor) -> Tensor | None:
    """Which anchors [A, 4] or [B, A, 4] lie more than half in one ignore region: [B, A] bool; None without regions."""
    if len(batch.ignore_boxes) == 0:
        return None
    regions, image = batch.ignore_boxes.to(anchors), batch.ignore_index
    per_region = anchors.expand(len(batch), -1, -1)[image]  # [I, A, 4]
    hits = (box_intersection(per_region, regions[:, None]) > 0.5 * box_area(per_region)).float()
    return torch.zeros(len(batch), anchors.shape[-2], device=anchors.device).index_add_(0, image, hits) > 0


def avg_factor(count: Tensor, *, more: float = 0.0, least: float = 1.0) -> Tensor:
    """max(least, count over all processes + more) / processes.

    A loss divided by it has, after averaging over processes, the gradients of one process with all images.
    """
    return (global_mean(count.float()) + more / _processes()).clamp(min=least / _processes())


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1
