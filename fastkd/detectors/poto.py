"""POTO: every box is matched with one location, so that nothing has to be suppressed."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from fastkd.boxes import box_iou
from fastkd.detectors.common.locations import LocationDetector, LocationHead, Matches, candidate_cells
from fastkd.detectors.common.targets import BACKGROUND, PaddedBoxes, avg_factor
from fastkd.types import Batch

ALPHA = 0.8  # exponent of the IoU in the quality; the class probability has 1 - ALPHA
RADIUS = 1.5  # strides; only locations this close to the centre of a box are candidates
BOX_WEIGHT = 2.0
DISALLOWED = -1.0


class POTOHead(LocationHead):
    """ATSS's head without centre-ness."""

    more: dict[str, int] = {}  # noqa: RUF012 - read only


class POTO(LocationDetector):
    """One-to-one label assignment by the quality of predictions; detections are the top scores.

    The quality of a box at a location is p^(1 - 0.8) * IoU^0.8, with the predicted probability p of the box's class
    and the IoU of the predicted box. Candidates are the locations inside the box, within 1.5 strides of its centre.
    The matching of greatest total quality gives each box at most one location.

    The matching runs on the CPU (scipy) and needs one transfer: at most 9 candidates per box and level.
    Source: End-to-End Object Detection with Fully Convolutional Network (Wang et al., 2020), without its 3D max filter.
    """

    head_class = POTOHead

    def _scores(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["cls_logits"].float().sigmoid()

    def _losses(self, outputs: dict[str, Tensor], pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The outputs of each pyramid are matched separately."""
        each = [
            dict(zip(outputs, values)) for values in zip(*(value.unbind() for value in outputs.values()), strict=True)
        ]
        found = [self._losses_of_one(output, pyramid, batch) for output in each]
        return {name: torch.stack([losses[name] for losses in found]) for name in found[0]}

    def _losses_of_one(self, outputs: dict[str, Tensor], pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        truth, anchors = PaddedBoxes.of(batch), torch.cat(self.anchors(pyramid))
        matches = Matches.of(self.assign(truth, outputs, pyramid, batch))
        count = avg_factor((matches.rows >= 0).sum())
        _, image, location, row = matches
        boxes = truth.boxes[image, row]
        predicted = self.box_coder.decode(outputs["bbox_regression"][image, location], anchors[location])
        classification = self._classification(outputs["cls_logits"], matches, anchors, truth, batch)
        return {
            "classification": classification / count,
            "box_regression": BOX_WEIGHT * generalized_box_iou_loss(predicted, boxes, reduction="sum") / count,
        }

    @torch.no_grad()
    def assign(self, truth: PaddedBoxes, outputs: dict[str, Tensor], pyramid: list[Tensor], batch: Batch) -> Tensor:
        """The row of `truth` assigned to each location, or BACKGROUND: [B, A] int64."""
        candidates, quality = self._candidates(truth, outputs, pyramid)
        matched = torch.full((len(candidates), outputs["cls_logits"].shape[1]), BACKGROUND)
        for assigned, counts, locations, values in zip(
            matched, batch.counts, candidates.cpu(), quality.cpu(), strict=True
        ):
            row, location = match_one_to_one(locations[:counts], values[:counts])
            assigned[location] = row
        return matched.to(candidates.device)

    def _candidates(
        self, truth: PaddedBoxes, outputs: dict[str, Tensor], pyramid: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Locations [B, K, M] near the boxes' centres and their qualities, DISALLOWED for non-candidates."""
        levels, centers = self.anchors(pyramid), (truth.boxes[..., :2] + truth.boxes[..., 2:]) / 2
        found, first = [], 0
        for anchors, level, stride in zip(levels, pyramid, self.strides, strict=True):
            found.append(candidate_cells(centers, level.shape[-2:], stride, 3) + first)
            first += len(anchors)
        candidates = torch.cat(found, -1)  # [B, K, M]
        anchor = torch.cat(levels)[candidates]  # [B, K, M, 4]
        middle, side = (anchor[..., :2] + anchor[..., 2:]) / 2, anchor[..., 2:] - anchor[..., :2]
        image = torch.arange(len(candidates), device=candidates.device)[:, None, None]
        predicted = self.box_coder.decode(
            outputs["bbox_regression"][image, candidates].flatten(0, 2), anchor.flatten(0, 2)
        )
        corner, end = truth.boxes[:, :, None].split(2, -1)
        iou = box_iou(truth.boxes[:, :, None], predicted.view_as(anchor))
        probability = outputs["cls_logits"][image, candidates, truth.labels[..., None]].sigmoid()
        near = (middle - centers[:, :, None]).abs() < RADIUS * side
        allowed = (near & (middle > corner) & (middle < end)).all(-1)
        return candidates, (probability ** (1 - ALPHA) * iou**ALPHA).masked_fill(~allowed, DISALLOWED)


def match_one_to_one(candidates: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
    """The matching of greatest total quality; each box and each location is in at most one pair.

    As many boxes as possible are matched: a pair counts at least 0, an unmatched box -1.

    Args:
        candidates: [K, M] int64, candidate locations of each box.
        quality: [K, M] in [0, 1], DISALLOWED for pairs that must not be matched.
    Returns: rows and locations of the pairs.
    """
    from scipy.optimize import linear_sum_assignment

    allowed = quality >= 0
    columns, column = candidates[allowed].unique(return_inverse=True)
    table = torch.full((len(candidates), len(columns) + len(candidates)), DISALLOWED, dtype=torch.float64)
    row = allowed.nonzero()[:, 0]
    table[row, column] = quality[allowed].double()
    row, column = (torch.from_numpy(index) for index in linear_sum_assignment(table.numpy(), maximize=True))
    real = table[row, column] >= 0  # the added columns stand for "unmatched"
    return row[real], columns[column[real]]
