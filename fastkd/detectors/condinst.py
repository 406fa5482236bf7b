"""CondInst: FCOS with a mask head whose weights are predicted for each location."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.detectors.common.dense import dense_candidates, nms_indices
from fastkd.detectors.common.instance_masks import (
    MASK_STRIDE,
    MASKS_AT_ONCE,
    aligned_upsample,
    coarse_masks,
    dice_loss,
    require_masks,
)
from fastkd.detectors.common.locations import Matches
from fastkd.detectors.common.sampling import draw_keys, image_generators
from fastkd.detectors.common.targets import PaddedBoxes, avg_factor
from fastkd.detectors.condinst_head import CondInstHead, dynamic_masks
from fastkd.detectors.fcos import FCOS
from fastkd.ops._support.coverage import full_precision
from fastkd.types import Batch, Detections

MASK_THRESHOLD = 0.5


class CondInst(FCOS):
    """FCOS with a learned scale for each level, whose positive locations also segment their instance.

    The controller predicts, for each location, the 169 parameters of three 1x1 convolutions that are applied to the
    image's mask features and the coordinates relative to the location. The dice loss at stride 4 is averaged over the
    positive locations, or over `mask_samples` of them per process, drawn from batch.seeds.
    Source: Conditional Convolutions for Instance Segmentation (Tian et al., 2020).
    """

    head_class = CondInstHead
    centered = True

    def losses(self, pyramids: list[list[Tensor]], batch: Batch) -> list[dict[str, Tensor]]:
        """`loss` of several pyramids; batch norms need one call of the head per pyramid to keep statistics separate."""
        require_masks("condinst", batch)
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.head.modules()):
            return [super(CondInst, self).losses([pyramid], batch)[0] for pyramid in pyramids]
        return super().losses(pyramids, batch)

    def _losses(self, outputs: dict[str, Tensor], pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        truth, levels = PaddedBoxes.of(batch), self.anchors(pyramid)
        anchors, matches = torch.cat(levels), Matches.of(self.assign(truth, levels))
        losses = self._box_losses(outputs, matches, anchors, truth, batch)
        parts = zip(outputs["mask_features"].unbind(), outputs["controller"].unbind(), strict=True)
        masks = [
            self._mask_loss({"mask_features": features, "controller": controller}, matches, anchors, batch)
            for features, controller in parts
        ]
        return losses | {"mask": torch.stack(masks)}

    def _mask_loss(self, outputs: dict[str, Tensor], matches: Matches, anchors: Tensor, batch: Batch) -> Tensor:
        image, location, rows = self._sampled(matches, batch)
        targets = coarse_masks(batch).split(batch.counts)
        total = (outputs["mask_features"].sum() + outputs["controller"].sum()) * 0.0  # without positives too
        for index, count in enumerate(torch.bincount(image, minlength=len(batch)).tolist()):
            current, location = location[:count], location[count:]
            row, rows = rows[:count], rows[count:]
            if count:
                logits = self._masks(outputs, anchors, index, current)
                total = total + dice_loss(logits, targets[index][row]).sum()
        return total / avg_factor(torch.tensor(len(image), device=total.device))

    @torch.no_grad()
    def _sampled(self, matches: Matches, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Images (ascending), locations and rows of `truth` in the mask loss."""
        _, image, location, row = matches
        if len(image) <= self.config.mask_samples:
            return image, location, row
        counts = torch.bincount(image, minlength=len(batch)).tolist()
        keys = draw_keys(image_generators(batch), counts, image.device)
        keys = torch.cat([row_keys[:count] for row_keys, count in zip(keys, counts, strict=True)])
        chosen = keys.topk(self.config.mask_samples, largest=False).indices.sort().values
        return image[chosen], location[chosen], row[chosen]

    def _masks(self, outputs: dict[str, Tensor], anchors: Tensor, image: int, location: Tensor) -> Tensor:
        """Mask logits [N, 2 * H_3, 2 * W_3] of locations of one image."""
        anchor = anchors[location]
        origins, widths = (anchor[:, :2] + anchor[:, 2:]) / 2, anchor[:, 2] - anchor[:, 0]
        features, parameters = outputs["mask_features"][image].float(), outputs["controller"][image, location].float()
        logits = dynamic_masks(features, parameters, origins, self.size_of_interest * widths, self.strides[0])
        return aligned_upsample(logits[:, None], self.strides[0] // MASK_STRIDE)[:, 0]

    @torch.no_grad()
    def detect(self, pyramid: list[Tensor], batch: Batch) -> list[Detections]:
        outputs, detections = self.head(pyramid), []
        with full_precision(pyramid[0]):
            anchors = torch.cat(self.anchors(pyramid))
            scores_and_decoder = self._scores_and_decoder(outputs, pyramid)
            boxes, scores, labels, locations = dense_candidates(*scores_and_decoder, batch, self.config)
            kept = nms_indices(boxes, scores, labels, self.config)
            for image, (index, size) in enumerate(zip(kept, batch.image_sizes.tolist(), strict=True)):
                masks = [torch.zeros(0, *size, dtype=torch.bool, device=boxes.device)]
                for some in locations[image, index].split(MASKS_AT_ONCE):
                    if len(some):
                        soft = self._masks(outputs, anchors, image, some).sigmoid()
                        soft = aligned_upsample(soft[:, None], MASK_STRIDE)[:, 0, : size[0], : size[1]]
                        masks.append(soft > MASK_THRESHOLD)
                detections.append(
                    Detections(boxes[image, index], scores[image, index], labels[image, index], torch.cat(masks))
                )
        return detections
