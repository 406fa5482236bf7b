"""POTO: every box is matched with one location, so that nothing has to be suppressed."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from fastkd.boxes import box_iou
from fastkd.detectors.common.locations import LocationDetector, LocationHead, Matches, candidate_cells
from fastkd.detectors.common.targets import BACKGROUND, PaddedBoxes, avg_factor
from fastkd.types import Batch

ALPHA = 0.8  # how much of the quality is the box's
RADIUS = 1.5  # strides from a box's centre within which locations may answer for it
BOX_WEIGHT = 2.0
DISALLOWED = -1.0


class POTOHead(LocationHead):
    """ATSS's head without centre-ness."""

    more: dict[str, int] = {}  # noqa: RUF012 - read only


class POTO(LocationDetector):
    """One-to-one label assignment by the quality of predictions; detections are the top scores.

    The quality of a box at a location is p^(1 - 0.8) * IoU^0.8 of the class's probability and the predicted box, within
    the box and 1.5 strides of its centre. Each box gets one location by the matching of greatest total quality; a box
    with no such location left gets none.

    The matching runs on the CPU (scipy), on at most 9 candidates a level for each box in one transfer.
    Source: End-to-End Object Detection with Fully Convolutional Network (Wang et al., 2020), without its 3D max filter.
    """

    head_class = POTOHead

    def _scores(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["cls_logits"].float().sigmoid()

    def _losses(self, outputs: dict[str, Tensor], pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """Every pyramid's outputs are matched by themselves."""
        each = [dict(zip(outputs, own)) for own in zip(*(value.unbind() for value in outputs.values()), strict=True)]
        found = [self._losses_of_one(own, pyramid, batch) for own in each]
        return {name: torch.stack([losses[name] for losses in found]) for name in found[0]}

    def _losses_of_one(self, outputs: dict[str, Tensor], pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        truth, anchors = PaddedBoxes.of(batch), torch.cat(self.anchors(pyramid))
        matches = Matches.of(self.assign(truth, outputs, pyramid, batch))
        count = avg_factor((matches.rows >= 0).sum())
        _, image, place, row = matches
        boxes = truth.boxes[image, row]
        predicted = self.box_coder.decode(outputs["bbox_regression"][image, place], anchors[place])
        classification = self._classification(outputs["cls_logits"], matches, anchors, truth, batch)
        return {
            "classification": classification / count,
            "box_regression": BOX_WEIGHT * generalized_box_iou_loss(predicted, boxes, reduction="sum") / count,
        }

    @torch.no_grad()
    def assign(self, truth: PaddedBoxes, outputs: dict[str, Tensor], pyramid: list[Tensor], batch: Batch) -> Tensor:
        """The row of `truth` each location answers for, or BACKGROUND: [B, A] int64."""
        places, quality = self._candidates(truth, outputs, pyramid)
        matched = torch.full((len(places), outputs["cls_logits"].shape[1]), BACKGROUND)
        for own, counts, where, values in zip(matched, batch.counts, places.cpu(), quality.cpu(), strict=True):
            row, place = match_one_to_one(where[:counts], values[:counts])
            own[place] = row
        return matched.to(places.device)

    def _candidates(
        self, truth: PaddedBoxes, outputs: dict[str, Tensor], pyramid: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Locations [B, K, M] near the boxes' centres and their qualities, DISALLOWED where they may not answer."""
        levels, centers = self.anchors(pyramid), (truth.boxes[..., :2] + truth.boxes[..., 2:]) / 2
        found, first = [], 0
        for anchors, level, stride in zip(levels, pyramid, self.strides, strict=True):
            found.append(candidate_cells(centers, level.shape[-2:], stride, 3) + first)
            first += len(anchors)
        places = torch.cat(found, -1)  # [B, K, M]
        own = torch.cat(levels)[places]  # [B, K, M, 4]
        middle, side = (own[..., :2] + own[..., 2:]) / 2, own[..., 2:] - own[..., :2]
        image = torch.arange(len(places), device=places.device)[:, None, None]
        predicted = self.box_coder.decode(outputs["bbox_regression"][image, places].flatten(0, 2), own.flatten(0, 2))
        corner, end = truth.boxes[:, :, None].split(2, -1)
        iou = box_iou(truth.boxes[:, :, None], predicted.view_as(own))
        probability = outputs["cls_logits"][image, places, truth.labels[..., None]].sigmoid()
        near = (middle - centers[:, :, None]).abs() < RADIUS * side
        allowed = (near & (middle > corner) & (middle < end)).all(-1)
        return places, (probability ** (1 - ALPHA) * iou**ALPHA).masked_fill(~allowed, DISALLOWED)


def match_one_to_one(places: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
    """The matching of greatest total quality, every box and every location in at most one pair.

    As many boxes as possible are matched (a match is worth at least 0, none -1).

    Args:
        places: [K, M] int64, candidate locations of each box.
        quality: [K, M] in [0, 1], DISALLOWED for those that may not be taken.
    Returns: rows and locations of the pairs.
    """
    from scipy.optimize import linear_sum_assignment

    allowed = quality >= 0
    columns, column = places[allowed].unique(return_inverse=True)
    table = torch.full((len(places), len(columns) + len(places)), DISALLOWED, dtype=torch.float64)
    row = allowed.nonzero()[:, 0]
    table[row, column] = quality[allowed].double()
    row, column = (torch.from_numpy(index) for index in linear_sum_assignment(table.numpy(), maximize=True))
    real = table[row, column] >= 0  # the columns without a location stand for "not matched"
    return row[real], columns[column[real]]
