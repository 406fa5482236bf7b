"""Faster and Mask R-CNN on P2 .. P6."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.detectors.backbones.resnet import build_backbone_and_neck
from fastkd.detectors.common.roi import RegionHeads
from fastkd.detectors.common.rpn import RegionProposals
from fastkd.detectors.common.sampling import image_generators
from fastkd.detectors.common.targets import PaddedBoxes
from fastkd.detectors.config import DetectorConfig
from fastkd.detectors.protocol import Detector, concat_pyramids
from fastkd.ops._support.coverage import full_precision
from fastkd.types import Batch, Detections


class TwoStageHead(nn.Module):
    """Both stages under torchvision's names: rpn and roi_heads."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.rpn = RegionProposals(config)
        self.roi_heads = RegionHeads(config)


class TwoStage(Detector):
    """Faster R-CNN or Mask R-CNN: proposals, then heads on the features pooled from them.

    Sampling for the losses of image b is seeded by batch.seeds[b]: a second call of `loss` with the same batch samples
    the same anchors and, among equal proposals, the same proposals.
    """

    head: TwoStageHead

    def __init__(self, config: DetectorConfig):
        super().__init__(config, *build_backbone_and_neck(config), TwoStageHead(config))

    def tensor_parts(self) -> dict[str, nn.Module]:
        rois = self.head.roi_heads
        names = ("box_head", "box_predictor", "mask_head", "mask_predictor")
        return {"rpn": self.head.rpn.head, **{name: getattr(rois, name) for name in names if hasattr(rois, name)}}

    def imitation_anchors(self) -> list[Tensor]:
        return self.head.rpn.anchors.cells

    def cell_scores(self, pyramid: list[Tensor]) -> list[Tensor]:
        logits, _ = self.head.rpn.head(pyramid)
        return [level.amax(1, keepdim=True).float().sigmoid() for level in logits]

    def losses(self, pyramids: list[list[Tensor]], batch: Batch) -> list[dict[str, Tensor]]:
        """`loss` of several pyramids: one call of each stage's head; proposals are computed per pyramid."""
        if self.config.detector == "mask_rcnn" and batch.masks is None:
            raise ValueError("loss: batch.masks must be [K, H, W] for mask_rcnn, got None; load the data with masks")
        config, rpn = self.config, self.head.rpn
        levels, limits = concat_pyramids(pyramids), {"pre_nms": config.rpn_pre_nms_train}
        limits["post_nms"] = config.rpn_post_nms_train
        outputs, rpn_losses, samples = rpn(levels).split(len(pyramids)), [], []
        with full_precision(levels[0]):
            truth = PaddedBoxes.of(batch)
            for output in outputs:
                generators = image_generators(batch)
                rpn_losses.append(rpn.loss(output, truth, batch, generators))
                proposals = rpn.proposals(output, batch, **limits)
                samples.append(self.head.roi_heads.sample(proposals, truth, batch, generators))
        roi_losses = self.head.roi_heads.losses(levels, samples, truth, batch)
        return [first | second for first, second in zip(rpn_losses, roi_losses, strict=True)]

    @torch.no_grad()
    def detect(self, pyramid: list[Tensor], batch: Batch) -> list[Detections]:
        config, rpn = self.config, self.head.rpn
        outputs = rpn(pyramid)
        with full_precision(pyramid[0]):
            proposals = rpn.proposals(
                outputs, batch, pre_nms=config.rpn_pre_nms_test, post_nms=config.rpn_post_nms_test
            )
        return self.head.roi_heads.detect(pyramid, proposals, batch)
