"""FCOS with torchvision's head, assignments and losses, computed for the whole batch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.ops import generalized_box_iou_loss

from fastkd.detectors.backbone import build_backbone_and_neck, group_norm
from fastkd.detectors.config import DetectorConfig
from fastkd.detectors.dense import PyramidAnchors, dense_detections
from fastkd.detectors.protocol import Detector
from fastkd.detectors.targets import (
    BELOW,
    MAX_PAIRS,
    PaddedBoxes,
    focal_loss,
    in_full_precision,
    inside_ignored,
    shared_count,
)
from fastkd.types import Batch, Detections

CENTER_RADIUS = 1.5  # strides from a box's centre within which locations are positive


class NarrowFCOSHead(FCOSHead):
    """torchvision's head for any number of channels, below 64 with fewer than 32 groups in its norms."""

    def __init__(self, config: DetectorConfig):
        nn.Module.__init__(self)  # FCOSHead's own constructor fixes the groups; what follows is its body
        sizes = {"in_channels": config.channels, "num_anchors": 1, "num_convs": config.head_convs}
        self.box_coder = BoxLinearCoder(normalize_by_size=True)
        self.classification_head = FCOSClassificationHead(
            num_classes=config.num_classes, norm_layer=group_norm, **sizes
        )
        self.regression_head = FCOSRegressionHead(norm_layer=group_norm, **sizes)


class FCOS(Detector):
    """FCOS: focal classification, GIoU box regression and centre-ness of the locations of P3 .. P7.

    A location is positive for a box if it lies inside, within 1.5 strides of the centre, and its farthest side is in
    the level's range; of several boxes it takes the smallest. Losses are divided by the positives of the batch.
    Source: FCOS (Tian et al., 2019), as torchvision's FCOS.
    """

    def __init__(self, config: DetectorConfig):
        super().__init__(config, *build_backbone_and_neck(config), NarrowFCOSHead(config))
        self.reach = config.anchor_base if config.anchor_base is not None else 8
        self.anchors = PyramidAnchors([(stride,) for stride in config.strides], (1.0,), config.strides)
        self.box_coder = BoxLinearCoder(normalize_by_size=True)

    def imitation_anchors(self) -> list[Tensor]:
        half = [self.reach * stride / 2 for stride in self.strides]
        return [torch.tensor([[-side, -side, side, side]]) for side in half]

    def loss(self, pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        outputs = self.head(pyramid)
        with in_full_precision(pyramid[0]):
            outputs = {name: value.float() for name, value in outputs.items()}
            return self._losses(outputs, self.anchors(pyramid), batch)

    def _losses(self, outputs: dict[str, Tensor], levels: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        anchors, truth = torch.cat(levels), PaddedBoxes.of(batch)
        matched = self.assign(truth, levels)  # [B, A]
        positive = matched >= 0
        count = shared_count(positive.sum())
        counted = torch.ones_like(positive)
        ignored = inside_ignored(batch, anchors)
        if ignored is not None:
            counted = positive | ~ignored
        image, place = positive.nonzero().unbind(1)
        row = matched[image, place]
        boxes, own = truth.boxes[image, row], anchors[place]  # [P, 4]
        predicted = self.box_coder.decode(outputs["bbox_regression"][image, place], own)
        sides = self.box_coder.encode(own, boxes)
        horizontal, vertical = sides[:, [0, 2]], sides[:, [1, 3]]
        centerness = torch.sqrt(
            horizontal.amin(1) / horizontal.amax(1) * (vertical.amin(1) / vertical.amax(1))
        )  # positive locations lie strictly inside their box
        logit = outputs["bbox_ctrness"][image, place, 0]
        return {
            "classification": focal_loss(outputs["cls_logits"], counted.float(), image, place, truth.labels[image, row])
            / count,
            "box_regression": generalized_box_iou_loss(predicted, boxes, reduction="sum") / count,
            "centerness": F.binary_cross_entropy_with_logits(logit, centerness, reduction="sum") / count,
        }

    def assign(self, truth: PaddedBoxes, levels: list[Tensor]) -> Tensor:
        """The row of `truth` each location answers for, or BELOW: [B, A] int64."""
        anchors = torch.cat(levels)
        size = anchors[:, 2] - anchors[:, 0]
        lower, upper = size * (self.reach / 2), size * self.reach
        lower[: len(levels[0])] = 0
        upper[-len(levels[-1]) :] = float("inf")
        step = max(1, MAX_PAIRS // (truth.boxes.shape[1] * len(anchors)))
        rows = [slice(start, start + step) for start in range(0, len(truth.boxes), step)]
        return torch.cat([_match(truth.images(some), anchors, size, lower, upper) for some in rows])

    @torch.no_grad()
    def detect(self, pyramid: list[Tensor], batch: Batch) -> list[Detections]:
        outputs = self.head(pyramid)
        anchors = self.anchors(pyramid)
        sizes = [len(level) for level in anchors]
        with in_full_precision(pyramid[0]):
            scores = (outputs["cls_logits"].float().sigmoid() * outputs["bbox_ctrness"].float().sigmoid()).sqrt()
            sides = outputs["bbox_regression"].float().split(sizes, dim=1)

            def decode(level: int, index: Tensor) -> Tensor:
                chosen = sides[level].gather(1, index[..., None].expand(-1, -1, 4))
                return self.box_coder.decode(chosen, anchors[level][index])

            return dense_detections(list(scores.split(sizes, dim=1)), decode, batch, self.config)


def _match(truth: PaddedBoxes, anchors: Tensor, size: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    x, y = ((anchors[:, side] + anchors[:, side + 2]) / 2 for side in (0, 1))  # [A]
    x1, y1, x2, y2 = (side[..., None] for side in truth.boxes.unbind(-1))  # [b, K, 1]
    off_center = torch.maximum((x - (x1 + x2) / 2).abs(), (y - (y1 + y2) / 2).abs())
    fits = (off_center < CENTER_RADIUS * size) & truth.valid[..., None]
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
    fits &= torch.minimum(torch.minimum(left, top), torch.minimum(right, bottom)) > 0
    farthest = torch.maximum(torch.maximum(left, top), torch.maximum(right, bottom))
    fits &= (farthest > lower) & (farthest < upper)
    preference = fits * (1e8 - (x2 - x1) * (y2 - y1))  # as torchvision: smallest area first
    value, best = preference.max(dim=1)
    return torch.where(value < 1e-5, BELOW, best)
