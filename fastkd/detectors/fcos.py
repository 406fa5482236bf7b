"""FCOS with torchvision's head, assignments and losses, computed for the whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.ops import generalized_box_iou_loss

from fastkd.detectors.backbones.base import group_norm
from fastkd.detectors.common.locations import LocationDetector, Matches, binary_errors, centerness
from fastkd.detectors.common.targets import BACKGROUND, MAX_PAIRS, PaddedBoxes, avg_factor
from fastkd.detectors.config import DetectorConfig
from fastkd.types import Batch

CENTER_RADIUS = 1.5  # strides; only locations this close to the centre of a box are positive


class NarrowFCOSHead(FCOSHead):
    """torchvision's head for any number of channels; with fewer than 64, its norms have fewer than 32 groups."""

    def __init__(self, config: DetectorConfig):
        nn.Module.__init__(self)  # FCOSHead's own constructor fixes the number of groups; its body is repeated here
        sizes = {"in_channels": config.channels, "num_anchors": 1, "num_convs": config.head_convs}
        self.box_coder = BoxLinearCoder(normalize_by_size=True)
        self.classification_head = FCOSClassificationHead(
            num_classes=config.num_classes, norm_layer=group_norm, **sizes
        )
        self.regression_head = FCOSRegressionHead(norm_layer=group_norm, **sizes)


class FCOS(LocationDetector):
    """FCOS: focal classification, GIoU box regression and centre-ness of the locations of P3 .. P7.

    A location is positive for a box if it lies inside it, within 1.5 strides of its centre, and its distance to the
    farthest side is in the level's range. A location that is positive for several boxes is assigned to the smallest.
    Losses are divided by the number of positive locations of the batch.
    Source: FCOS (Tian et al., 2019), as torchvision's FCOS.
    """

    head_class: type[nn.Module] = NarrowFCOSHead
    centered = False

    def _losses(self, outputs: dict[str, Tensor], pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        truth, levels = PaddedBoxes.of(batch), self.anchors(pyramid)
        matches = Matches.of(self.assign(truth, levels))
        return self._box_losses(outputs, matches, torch.cat(levels), truth, batch)

    def _box_losses(
        self, outputs: dict[str, Tensor], matches: Matches, anchors: Tensor, truth: PaddedBoxes, batch: Batch
    ) -> dict[str, Tensor]:
        count = avg_factor((matches.rows >= 0).sum())
        _, image, location, row = matches
        boxes, anchor = truth.boxes[image, row], anchors[location]  # [P, 4]
        predicted = self.box_coder.decode(outputs["bbox_regression"][:, image, location], anchor)  # [R, P, 4]
        target = centerness(self.box_coder.encode(anchor, boxes))  # positive locations lie strictly inside their box
        logit = outputs["bbox_ctrness"][:, image, location, 0]
        classification = self._classification(outputs["cls_logits"], matches, anchors, truth, batch)
        return {
            "classification": classification / count,
            "box_regression": generalized_box_iou_loss(predicted, boxes.expand_as(predicted)).sum(1) / count,
            "centerness": binary_errors(logit, target) / count,
        }

    def assign(self, truth: PaddedBoxes, levels: list[Tensor]) -> Tensor:
        """The row of `truth` assigned to each location, or BACKGROUND: [B, A] int64."""
        anchors = torch.cat(levels)
        size = anchors[:, 2] - anchors[:, 0]
        lower, upper = size * (self.size_of_interest / 2), size * self.size_of_interest
        lower[: len(levels[0])] = 0
        upper[-len(levels[-1]) :] = float("inf")
        step = max(1, MAX_PAIRS // (truth.boxes.shape[1] * len(anchors)))
        rows = [slice(start, start + step) for start in range(0, len(truth.boxes), step)]
        return torch.cat([_match(truth.images(some), anchors, size, lower, upper) for some in rows])


def _match(truth: PaddedBoxes, anchors: Tensor, size: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    x, y = ((anchors[:, side] + anchors[:, side + 2]) / 2 for side in (0, 1))  # [A]
    x1, y1, x2, y2 = (side[..., None] for side in truth.boxes.unbind(-1))  # [b, K, 1]
    off_center = torch.maximum((x - (x1 + x2) / 2).abs(), (y - (y1 + y2) / 2).abs())
    positive = (off_center < CENTER_RADIUS * size) & truth.valid[..., None]
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
    positive &= torch.minimum(torch.minimum(left, top), torch.minimum(right, bottom)) > 0
    farthest = torch.maximum(torch.maximum(left, top), torch.maximum(right, bottom))
    positive &= (farthest > lower) & (farthest < upper)
    preference = positive * (1e8 - (x2 - x1) * (y2 - y1))  # as torchvision: smallest area first
    value, best = preference.max(dim=1)
    return torch.where(value < 1e-5, BACKGROUND, best)
