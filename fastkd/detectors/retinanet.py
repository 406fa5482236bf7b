"""RetinaNet with torchvision's head, assignments and losses, computed for the whole batch at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNetHead

from fastkd.detectors.backbones.resnet import build_backbone_and_neck
from fastkd.detectors.common.dense import PyramidAnchors, dense_detections, highest_by_cell
from fastkd.detectors.common.targets import IGNORE, PaddedBoxes, inside_ignored, match_anchors
from fastkd.detectors.config import DetectorConfig
from fastkd.detectors.protocol import Detector, concat_pyramids, split_losses
from fastkd.ops._support.coverage import full_precision
from fastkd.ops.focal_loss import focal_loss
from fastkd.types import Batch, Detections


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 8, channels)


class _Targets(NamedTuple):
    """Classification weights and regression targets.

    weight [B, A] of each anchor's class entries; then for the P positive anchors:
    weight [P], image [P], anchor [P], label [P], deltas [P, 4].
    """

    weight: Tensor
    share: Tensor
    image: Tensor
    anchor: Tensor
    label: Tensor
    deltas: Tensor


def _losses(logits: Tensor, deltas: Tensor, targets: _Targets) -> dict[str, Tensor]:
    """The losses [R] of the outputs [R, B, A, ...] of R pyramids."""
    image, anchor = targets.image, targets.anchor
    error = (deltas[:, image, anchor] - targets.deltas).abs().sum(2)
    return {
        "classification": focal_loss(logits, targets.weight, image, anchor, targets.label),
        "box_regression": (error * targets.share).sum(1),
    }


class RetinaNet(Detector):
    """RetinaNet: focal classification and L1 box regression of anchors on P3 .. P7.

    An anchor is positive from IoU 0.5, background below 0.4, and ignored in between; the best anchors of a box are
    always positive. Losses are divided by the number of positives of each image, then averaged over the images.
    Source: Focal Loss for Dense Object Detection (Lin et al., 2017), as torchvision's RetinaNet.
    """

    head: RetinaNetHead

    def __init__(self, config: DetectorConfig):
        anchors = PyramidAnchors(
            config.anchor_sizes(), config.aspect_ratios(), config.strides, rounding=config.anchor_rounding
        )
        norm_layer = _group_norm if config.head_norm == "gn" else None
        head = RetinaNetHead(config.channels, anchors.per_cell, config.num_classes, norm_layer)
        for tower in (head.classification_head, head.regression_head):
            tower.conv = tower.conv[: config.head_convs]
        super().__init__(config, *build_backbone_and_neck(config), head)
        self.anchors = anchors
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))

    def imitation_anchors(self) -> list[Tensor]:
        return self.anchors.cells

    def cell_scores(self, pyramid: list[Tensor]) -> list[Tensor]:
        return highest_by_cell(self.head.classification_head(pyramid), pyramid)

    def losses(self, pyramids: list[list[Tensor]], batch: Batch) -> list[dict[str, Tensor]]:
        """`loss` of several pyramids: one call of the head on all their images, one assignment of anchors."""
        outputs = self.head(concat_pyramids(pyramids))
        with full_precision(pyramids[0][0]):
            targets = self._targets(pyramids[0], batch)
            logits, deltas = (
                outputs[name].unflatten(0, (len(pyramids), len(batch))) for name in ("cls_logits", "bbox_regression")
            )
            return split_losses(_losses(logits, deltas.float(), targets))

    def _targets(self, pyramid: list[Tensor], batch: Batch) -> _Targets:
        anchors, truth = torch.cat(self.anchors(pyramid)), PaddedBoxes.of(batch)
        matched = match_anchors(truth, anchors, 0.4, 0.5, keep_best=True)  # [B, A]
        positive = matched >= 0
        share = 1.0 / (positive.sum(1).clamp(min=1) * len(batch))  # [B]
        counted = matched != IGNORE
        ignored = inside_ignored(batch, anchors)
        if ignored is not None:
            counted &= positive | ~ignored
        image, anchor = positive.nonzero().unbind(1)
        row = matched[image, anchor]
        deltas = self.box_coder.encode_single(truth.boxes[image, row], anchors[anchor])
        return _Targets(counted * share[:, None], share[image], image, anchor, truth.labels[image, row], deltas)

    @torch.no_grad()
    def detect(self, pyramid: list[Tensor], batch: Batch) -> list[Detections]:
        outputs = self.head(pyramid)
        anchors = self.anchors(pyramid)
        sizes = [len(level) for level in anchors]
        with full_precision(pyramid[0]):
            scores = outputs["cls_logits"].float().sigmoid().split(sizes, dim=1)
            deltas = outputs["bbox_regression"].float().split(sizes, dim=1)

            def decode(level: int, index: Tensor) -> Tensor:
                chosen = deltas[level].gather(1, index[..., None].expand(-1, -1, 4))
                boxes = self.box_coder.decode_single(chosen.flatten(0, 1), anchors[level][index.flatten()])
                return boxes.view(*index.shape, 4)

            return dense_detections(list(scores), decode, batch, self.config)
