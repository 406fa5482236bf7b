"""CondInst: FCOS whose locations each write the network that segments their instance."""

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

    A location's controller writes 169 parameters of three 1x1 convolutions, applied to the image's mask features and
    the coordinates relative to the location. Dice loss at stride 4, averaged over the positive locations, at most
    `mask_samples` a process; which ones is drawn from batch.seeds.
    Source: Conditional Convolutions for Instance Segmentation (Tian et al., 2020).
    """

    head_class = CondInstHead
    centered = True

    def losses(self, pyramids: list[list[Tensor]], batch: Batch) -> list[dict[str, Tensor]]:
        """One call of the head for each pyramid where it has batch statistics, which are each pyramid's own."""
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
        image, place, rows = self._sampled(matches, batch)
        targets = coarse_masks(batch).split(batch.counts)
        total = (outputs["mask_features"].sum() + outputs["controller"].sum()) * 0.0  # the graph, should nothing follow
        for index, count in enumerate(torch.bincount(image, minlength=len(batch)).tolist()):
            own, place = place[:count], place[count:]
            row, rows = rows[:count], rows[count:]
            if count:
                logits = self._masks(outputs, anchors, index, own)
                total = total + dice_loss(logits, targets[index][row]).sum()
        return total / avg_factor(torch.tensor(len(image), device=total.device))

    @torch.no_grad()
    def _sampled(self, matches: Matches, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Images (ascending), places and rows of the locations in the mask loss."""
        _, image, place, row = matches
        if len(image) <= self.config.mask_samples:
            return image, place, row
        counts = torch.bincount(image, minlength=len(batch)).tolist()
        keys = draw_keys(image_generators(batch), counts, image.device)
        keys = torch.cat([own[:count] for own, count in zip(keys, counts, strict=True)])
        chosen = keys.topk(self.config.mask_samples, largest=False).indices.sort().values
        return image[chosen], place[chosen], row[chosen]

    def _masks(self, outputs: dict[str, Tensor], anchors: Tensor, image: int, place: Tensor) -> Tensor:
        """Mask logits [N, 2 * H_3, 2 * W_3] of locations of one image."""
        own = anchors[place]
        origins, sides = (own[:, :2] + own[:, 2:]) / 2, own[:, 2] - own[:, 0]
        features, parameters = outputs["mask_features"][image].float(), outputs["controller"][image, place].float()
        logits = dynamic_masks(features, parameters, origins, self.size_of_interest * sides, self.strides[0])
        return aligned_upsample(logits[:, None], self.strides[0] // MASK_STRIDE)[:, 0]

    @torch.no_grad()
    def detect(self, pyramid: list[Tensor], batch: Batch) -> list[Detections]:
        outputs, found = self.head(pyramid), []
        with full_precision(pyramid[0]):
            anchors = torch.cat(self.anchors(pyramid))
            scores_and_decoder = self._scores_and_decoder(outputs, pyramid)
            boxes, scores, labels, places = dense_candidates(*scores_and_decoder, batch, self.config)
            kept = nms_indices(boxes, scores, labels, self.config)
            for image, (own, size) in enumerate(zip(kept, batch.image_sizes.tolist(), strict=True)):
                masks = [torch.zeros(0, *size, dtype=torch.bool, device=boxes.device)]
                for some in places[image, own].split(MASKS_AT_ONCE):
                    if len(some):
                        soft = self._masks(outputs, anchors, image, some).sigmoid()
                        soft = aligned_upsample(soft[:, None], MASK_STRIDE)[:, 0, : size[0], : size[1]]
                        masks.append(soft > MASK_THRESHOLD)
                found.append(Detections(boxes[image, own], scores[image, own], labels[image, own], torch.cat(masks)))
        return found
