"""The second stage of Faster and Mask R-CNN: classes, boxes and masks of pooled proposals."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

from fastkd.detectors.common.dense import clip_boxes, suppress
from fastkd.detectors.common.roi_align import PyramidRoIAlign
from fastkd.detectors.common.sampling import draw_keys, sample_balanced
from fastkd.detectors.common.targets import (
    PaddedBoxes,
    avg_factor,
    inside_ignored,
    match_anchors,
)
from fastkd.detectors.config import DetectorConfig
from fastkd.ops._support.coverage import full_precision
from fastkd.types import Batch, Detections

SMALLEST_SIDE = 1e-2  # pixels; thinner detections are dropped, as in torchvision
MASKS_AT_ONCE = 16  # pasted masks held as float32 images


class Sample(NamedTuple):
    """Sampled proposals of the box loss, concatenated over images.

    boxes [R, 4], image [R], labels [R] (0 = background), row [R] of the matched box in the padded ground truth.
    """

    boxes: Tensor
    image: Tensor
    labels: Tensor
    row: Tensor


class RegionHeads(nn.Module):
    """torchvision's RoI heads, with matching, sampling and losses computed for the whole batch at once.

    A proposal is positive from IoU 0.5, else background. Cross-entropy and smooth L1 (beta 1/9) are divided by the
    number of sampled proposals. Masks: binary cross-entropy of the positives at 28 x 28.
    Source: Faster R-CNN (Ren et al., 2015), Mask R-CNN (He et al., 2017), as torchvision's RoIHeads.
    """

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.config = config
        self.box_coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
        self.box_roi_pool = PyramidRoIAlign(7, config.roi_canonical_size, config.roi_aligned)
        self.box_head = TwoMLPHead(config.channels * 7 * 7, config.box_head_channels)
        self.box_predictor = FastRCNNPredictor(config.box_head_channels, config.num_classes + 1)
        if config.detector == "mask_rcnn":
            width = config.mask_head_channels
            self.mask_roi_pool = PyramidRoIAlign(14, config.roi_canonical_size, config.roi_aligned)
            self.mask_head = MaskRCNNHeads(config.channels, [width] * 4, dilation=1)
            self.mask_predictor = MaskRCNNPredictor(width, width, config.num_classes + 1)

    def losses(
        self, levels: list[Tensor], samples: list[Sample], truth: PaddedBoxes, batch: Batch
    ) -> list[dict[str, Tensor]]:
        """Losses "roi_classification", "roi_box" and, for Mask R-CNN, "roi_mask", for each of R pyramids.

        Args:
            levels: the R pyramids, concatenated.
            samples: result of `sample` for each pyramid.
        """
        boxes = [per_image for sample in samples for per_image in self._by_image(sample.boxes, sample.image, batch)]
        outputs = (values.split([len(sample.boxes) for sample in samples]) for values in self._boxes(levels, boxes))
        logits, deltas = outputs
        results = [self._box_losses(*part, truth) for part in zip(logits, deltas, samples, strict=True)]
        if self.config.detector == "mask_rcnn":
            for losses, loss in zip(results, self._mask_losses(levels, samples, truth, batch), strict=True):
                losses["roi_mask"] = loss
        return results

    @torch.no_grad()
    def sample(
        self, proposals: list[Tensor], truth: PaddedBoxes, batch: Batch, generators: list[torch.Generator]
    ) -> Sample:
        """Samples from the proposals and the ground-truth boxes."""
        pools = [
            torch.cat([proposal, boxes[valid]])
            for proposal, boxes, valid in zip(proposals, truth.boxes, truth.valid, strict=True)
        ]
        counts = [len(pool) for pool in pools]
        boxes = nn.utils.rnn.pad_sequence(pools, batch_first=True)  # [B, P, 4]
        matched = match_anchors(truth, boxes, 0.5, 0.5, keep_best=False)
        row = matched.clamp(min=0)
        labels = torch.where(matched >= 0, truth.labels.gather(1, row) + 1, 0)
        ignored = inside_ignored(batch, boxes)
        if ignored is not None:
            labels = labels.masked_fill(ignored & (labels == 0), -1)
        keys = draw_keys(generators, counts, boxes.device)
        index, taken = sample_balanced(labels, keys, self.config.roi_samples, self.config.roi_positive_fraction)
        image, column = taken.nonzero().unbind(1)
        chosen = index[image, column]
        return Sample(boxes[image, chosen], image, labels[image, chosen], row[image, chosen])

    def _by_image(self, boxes: Tensor, image: Tensor, batch: Batch) -> list[Tensor]:
        return list(boxes.split(torch.bincount(image, minlength=len(batch)).tolist()))

    def _boxes(self, pyramid: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(pyramid, boxes)))
        return logits.float(), deltas.float()

    def _box_losses(self, logits: Tensor, deltas: Tensor, sample: Sample, truth: PaddedBoxes) -> dict[str, Tensor]:
        with full_precision(logits):
            count = avg_factor(torch.tensor(len(logits), device=logits.device))
            classification = F.cross_entropy(logits, sample.labels, reduction="sum") / count
            positive = sample.labels.nonzero()[:, 0]
            boxes = truth.boxes[sample.image[positive], sample.row[positive]]
            target = self.box_coder.encode_single(boxes, sample.boxes[positive])
            predicted = deltas.view(-1, self.config.num_classes + 1, 4)[positive, sample.labels[positive]]
            box = F.smooth_l1_loss(predicted, target, beta=1 / 9, reduction="sum") / count
        return {"roi_classification": classification, "roi_box": box}

    def _mask_losses(
        self, levels: list[Tensor], samples: list[Sample], truth: PaddedBoxes, batch: Batch
    ) -> list[Tensor]:
        positives = [sample.labels.nonzero()[:, 0] for sample in samples]
        chosen = [Sample(*(values[mask] for values in sample)) for sample, mask in zip(samples, positives, strict=True)]
        by_image = [self._by_image(sample.boxes, sample.image, batch) for sample in chosen]
        labels = torch.cat([sample.labels for sample in chosen])
        logits = self._masks(levels, [boxes for sample_boxes in by_image for boxes in sample_boxes], labels)
        parts = zip(logits.split([len(sample.labels) for sample in chosen]), by_image, chosen, strict=True)
        return [self._mask_loss(part, boxes, sample.row, batch) for part, boxes, sample in parts]

    def _mask_loss(self, logits: Tensor, by_image: list[Tensor], row: Tensor, batch: Batch) -> Tensor:
        """Mask loss of one pyramid. Args: by_image: boxes of each image; row: row of each box in the ground truth."""
        with full_precision(logits), torch.no_grad():
            rows = row.split([len(boxes) for boxes in by_image])
            assert batch.masks is not None  # checked in TwoStage.losses
            masks = batch.masks.split(batch.counts)
            parts = [
                project_masks_on_boxes(mask, boxes, rows_of_image, logits.shape[-1])
                for mask, boxes, rows_of_image in zip(masks, by_image, rows, strict=True)
                if len(boxes)
            ]
            target = torch.cat(parts) if parts else logits.detach()
            cells = avg_factor(torch.tensor(len(logits), device=logits.device)) * logits.shape[-1] ** 2
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / cells

    def _masks(self, pyramid: list[Tensor], boxes: list[Tensor], labels: Tensor) -> Tensor:
        """Mask logits [R, 28, 28] of each box's class (1 = the first)."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(pyramid, boxes)))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()

    @torch.no_grad()
    def detect(self, pyramid: list[Tensor], proposals: list[Tensor], batch: Batch) -> list[Detections]:
        """Detections of the proposals, B tensors [P_b, 4]."""
        logits, deltas = self._boxes(pyramid, proposals)
        with full_precision(logits):
            detections = self._select(logits, deltas, proposals, batch)
        if self.config.detector == "mask_rcnn":
            self._add_masks(pyramid, detections, batch)
        return detections

    def _select(self, logits: Tensor, deltas: Tensor, proposals: list[Tensor], batch: Batch) -> list[Detections]:
        counts = [len(boxes) for boxes in proposals]
        decoded = self.box_coder.decode_single(deltas, torch.cat(proposals)).view(-1, self.config.num_classes + 1, 4)[
            :, 1:
        ]
        scores = logits.softmax(-1)[:, 1:]
        boxes = nn.utils.rnn.pad_sequence(decoded.split(counts), batch_first=True).flatten(1, 2)  # [B, P * classes, 4]
        scores = nn.utils.rnn.pad_sequence(scores.split(counts), batch_first=True).flatten(1)
        boxes = clip_boxes(boxes, batch)
        good = ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST_SIDE).all(-1) & (scores > self.config.score_threshold)
        scores = scores.masked_fill(~good, -1.0)
        labels = torch.arange(scores.shape[1], device=scores.device) % self.config.num_classes
        return suppress(boxes, scores, labels.expand_as(scores), self.config)

    def _add_masks(self, pyramid: list[Tensor], detections: list[Detections], batch: Batch) -> None:
        labels = torch.cat([detection.labels for detection in detections]) + 1
        logits = self._masks(pyramid, [detection.boxes for detection in detections], labels)
        parts = logits.sigmoid()[:, None].split([len(detection) for detection in detections])
        for detection, masks, (height, width) in zip(detections, parts, batch.image_sizes.tolist(), strict=True):
            pasted = [torch.zeros(0, height, width, dtype=torch.bool, device=masks.device)]
            for some, boxes in zip(masks.split(MASKS_AT_ONCE), detection.boxes.split(MASKS_AT_ONCE), strict=True):
                if len(some):
                    pasted.append(paste_masks_in_image(some, boxes, (height, width))[:, 0] > 0.5)
            detection.masks = torch.cat(pasted)
