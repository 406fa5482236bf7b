"""ATSS with one location a cell: positives by an IoU threshold that each box sets for itself."""

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

CANDIDATES = 9  # locations of a level that a box considers
BOX_WEIGHT = 2.0


class ATSS(LocationDetector):
    """ATSS: focal classification, GIoU box regression weighted by centre-ness, and centre-ness.

    A box's candidates are on each level the 9 locations nearest to its centre. It takes those inside it whose squares
    of 8 strides overlap it (IoU) by at least mean + standard deviation over all its candidates; of several boxes a
    location takes the one of highest IoU.
    Source: Bridging the Gap Between Anchor-based and Anchor-free Detection (Zhang et al., 2020).
    """

    head_class = LocationHead

    def _losses(self, outputs: dict[str, Tensor], pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        truth, anchors = PaddedBoxes.of(batch), torch.cat(self.anchors(pyramid))
        matches = Matches.of(self.assign(truth, pyramid))
        count = avg_factor((matches.rows >= 0).sum())
        _, image, place, row = matches
        boxes, own = truth.boxes[image, row], anchors[place]  # [P, 4]
        predicted = self.box_coder.decode(outputs["bbox_regression"][:, image, place], own)  # [R, P, 4]
        weight = centerness(self.box_coder.encode(own, boxes))
        error = generalized_box_iou_loss(predicted, boxes.expand_as(predicted)) * weight
        logit = outputs["bbox_ctrness"][:, image, place, 0]
        classification = self._classification(outputs["cls_logits"], matches, anchors, truth, batch)
        return {
            "classification": classification / count,
            "box_regression": BOX_WEIGHT * error.sum(1) / avg_factor(weight.sum(), least=1e-6),
            "centerness": binary_errors(logit, weight) / count,
        }

    @torch.no_grad()
    def assign(self, truth: PaddedBoxes, pyramid: list[Tensor]) -> Tensor:
        """The row of `truth` each location answers for, or BACKGROUND: [B, A] int64."""
        levels = self.anchors(pyramid)
        anchors, grids = torch.cat(levels), [level.shape[-2:] for level in pyramid]
        places = self._candidates(truth, levels, grids)  # [B, K, M]
        own = anchors[places]  # [B, K, M, 4]
        middle, half = (own[..., :2] + own[..., 2:]) / 2, (own[..., 2:] - own[..., :2]) * (self.size_of_interest / 2)
        iou = box_iou(truth.boxes[:, :, None], torch.cat([middle - half, middle + half], -1))
        threshold = iou.mean(-1, keepdim=True) + iou.std(-1, keepdim=True)
        first, last = truth.boxes[:, :, None].split(2, -1)
        fits = (iou >= threshold) & ((middle > first) & (middle < last)).all(-1) & truth.valid[..., None]
        return _highest(fits, iou, places, len(anchors))

    def _candidates(self, truth: PaddedBoxes, levels: list[Tensor], grids: Sequence[Sequence[int]]) -> Tensor:
        centers, found, first = (truth.boxes[..., :2] + truth.boxes[..., 2:]) / 2, [], 0
        for anchors, grid, stride in zip(levels, grids, self.strides, strict=True):
            window = candidate_cells(centers, grid, stride, CANDIDATES)
            own = anchors[window]
            distance = ((own[..., :2] + own[..., 2:]) / 2 - centers[:, :, None]).square().sum(-1)
            nearest = distance.topk(min(CANDIDATES, distance.shape[-1]), largest=False).indices
            found.append(window.gather(-1, nearest) + first)
            first += len(anchors)
        return torch.cat(found, -1)


def _highest(fits: Tensor, value: Tensor, places: Tensor, locations: int) -> Tensor:
    """The row of the entry of highest value that fits at each location, the first of equals, or BACKGROUND.

    Args:
        fits, value, places: [B, K, M]; row k says that its location places[b, k, m] fits.
    Returns: [B, locations] int64.
    """
    batch, rows, _ = places.shape
    flat, value = places.flatten(1), value.masked_fill(~fits, -1.0).flatten(1)
    best = torch.full((batch, locations), -1.0, device=value.device).scatter_reduce(1, flat, value, "amax")
    wins = fits.flatten(1) & (value == best.gather(1, flat))
    row = torch.arange(rows, device=flat.device)[:, None].expand_as(places[0]).flatten()
    row = torch.where(wins, row, rows)
    first = torch.full((batch, locations), rows, device=flat.device).scatter_reduce(1, flat, row, "amin")
    return torch.where(first < rows, first, BACKGROUND)
