"""ATSS with one location per cell: positives by an IoU threshold computed for each box."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from fastkd.boxes import box_iou
from fastkd.detectors.common.locations import (
    LocationDetector,
    LocationHead,
    Matches,
    binary_errors,
    candidate_cells,
    centerness,
)
from fastkd.detectors.common.targets import BACKGROUND, PaddedBoxes, avg_factor
from fastkd.types import Batch

CANDIDATES = 9  # candidate locations of a box on each level
BOX_WEIGHT = 2.0


class ATSS(LocationDetector):
    """ATSS: focal classification, GIoU box regression weighted by centre-ness, and centre-ness.

    The candidates of a box are the 9 locations nearest to its centre on each level. A candidate is positive if it lies
    inside the box and its square of 8 strides has an IoU with the box of at least mean + standard deviation over all
    candidates of the box. A location that is positive for several boxes is assigned to the one of highest IoU.
    Source: Bridging the Gap Between Anchor-based and Anchor-free Detection (Zhang et al., 2020).
    """

    head_class = LocationHead

    def _losses(self, outputs: dict[str, Tensor], pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        truth, anchors = PaddedBoxes.of(batch), torch.cat(self.anchors(pyramid))
        matches = Matches.of(self.assign(truth, pyramid))
        count = avg_factor((matches.rows >= 0).sum())
        _, image, location, row = matches
        boxes, anchor = truth.boxes[image, row], anchors[location]  # [P, 4]
        predicted = self.box_coder.decode(outputs["bbox_regression"][:, image, location], anchor)  # [R, P, 4]
        weight = centerness(self.box_coder.encode(anchor, boxes))
        error = generalized_box_iou_loss(predicted, boxes.expand_as(predicted)) * weight
        logit = outputs["bbox_ctrness"][:, image, location, 0]
        classification = self._classification(outputs["cls_logits"], matches, anchors, truth, batch)
        return {
            "classification": classification / count,
            "box_regression": BOX_WEIGHT * error.sum(1) / avg_factor(weight.sum(), least=1e-6),
            "centerness": binary_errors(logit, weight) / count,
        }

    @torch.no_grad()
    def assign(self, truth: PaddedBoxes, pyramid: list[Tensor]) -> Tensor:
        """The row of `truth` assigned to each location, or BACKGROUND: [B, A] int64."""
        levels = self.anchors(pyramid)
        anchors, grids = torch.cat(levels), [level.shape[-2:] for level in pyramid]
        candidates = self._candidates(truth, levels, grids)  # [B, K, M]
        anchor = anchors[candidates]  # [B, K, M, 4]
        middle, half = (
            (anchor[..., :2] + anchor[..., 2:]) / 2,
            (anchor[..., 2:] - anchor[..., :2]) * (self.size_of_interest / 2),
        )
        iou = box_iou(truth.boxes[:, :, None], torch.cat([middle - half, middle + half], -1))
        threshold = iou.mean(-1, keepdim=True) + iou.std(-1, keepdim=True)
        first, last = truth.boxes[:, :, None].split(2, -1)
        positive = (iou >= threshold) & ((middle > first) & (middle < last)).all(-1) & truth.valid[..., None]
        return _highest(positive, iou, candidates, len(anchors))

    def _candidates(self, truth: PaddedBoxes, levels: list[Tensor], grids: Sequence[Sequence[int]]) -> Tensor:
        centers, nearest_locations, first = (truth.boxes[..., :2] + truth.boxes[..., 2:]) / 2, [], 0
        for anchors, grid, stride in zip(levels, grids, self.strides, strict=True):
            window = candidate_cells(centers, grid, stride, CANDIDATES)
            anchor = anchors[window]
            distance = ((anchor[..., :2] + anchor[..., 2:]) / 2 - centers[:, :, None]).square().sum(-1)
            nearest = distance.topk(min(CANDIDATES, distance.shape[-1]), largest=False).indices
            nearest_locations.append(window.gather(-1, nearest) + first)
            first += len(anchors)
        return torch.cat(nearest_locations, -1)


def _highest(positive: Tensor, value: Tensor, candidates: Tensor, locations: int) -> Tensor:
    """The row of `truth` with the highest value among the positives of each location, or BACKGROUND.

    Ties go to the lower row.

    Args:
        positive, value, candidates: [B, K, M]; positive[b, k, m]: row k is positive at location candidates[b, k, m].
    Returns: [B, locations] int64.
    """
    batch, rows, _ = candidates.shape
    flat, value = candidates.flatten(1), value.masked_fill(~positive, -1.0).flatten(1)
    best = torch.full((batch, locations), -1.0, device=value.device).scatter_reduce(1, flat, value, "amax")
    wins = positive.flatten(1) & (value == best.gather(1, flat))
    row = torch.arange(rows, device=flat.device)[:, None].expand_as(candidates[0]).flatten()
    row = torch.where(wins, row, rows)
    first = torch.full((batch, locations), rows, device=flat.device).scatter_reduce(1, flat, row, "amin")
    return torch.where(first < rows, first, BACKGROUND)
