"""SOLOv2: instances separated by location, without boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.detectors.backbones.resnet import build_backbone_and_neck
from fastkd.detectors.common.instance_masks import coarse_masks, dice_loss, require_masks
from fastkd.detectors.common.targets import BACKGROUND, PaddedBoxes, avg_factor, inside_ignored
from fastkd.detectors.config import DetectorConfig
from fastkd.detectors.protocol import Detector, concat_pyramids, split_losses
from fastkd.detectors.solov2_detect import detect_instances
from fastkd.detectors.solov2_head import SOLOv2Head
from fastkd.ops._support.coverage import full_precision
from fastkd.ops.focal_loss import focal_loss
from fastkd.types import Batch, Detections

CENTER = 0.2  # size of the positive centre region as a fraction of the instance's width and height
MASK_WEIGHT = 3.0


class SOLOv2(Detector):
    """SOLOv2: each level divides the image into a grid; a cell classifies and segments the instance centred in it.

    An instance is assigned to the levels whose range contains sqrt(area) of its box. Positive are the cells in its
    centre region, 0.2 of the box's width and height around the mask's centre of mass, at most 3 x 3 cells. A cell that
    is positive for several instances is assigned to the smallest. The focal loss is divided by positives + 1; the dice
    loss at stride 4 is averaged over the positives and weighted by 3.
    Source: SOLOv2: Dynamic and Fast Instance Segmentation (Wang et al., 2020).
    """

    def __init__(self, config: DetectorConfig):
        super().__init__(config, *build_backbone_and_neck(config), SOLOv2Head(config))
        self.base = config.anchor_base if config.anchor_base is not None else 12

    def losses(self, pyramids: list[list[Tensor]], batch: Batch) -> list[dict[str, Tensor]]:
        """`loss` of several pyramids: one call of the head on all of their images, one assignment."""
        require_masks("solov2", batch)
        outputs = self.head(concat_pyramids(pyramids))
        with full_precision(pyramids[0][0]):
            shape = (len(pyramids), len(batch))
            outputs = {name: value.float().unflatten(0, shape) for name, value in outputs.items()}
            return split_losses(self._losses(outputs, batch))

    def _losses(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The losses [R] of outputs [R, B, ...] on R pyramids."""
        logits, truth = outputs["cls_logits"], PaddedBoxes.of(batch)
        matched = self.assign(truth, batch)
        positive = matched >= 0
        counted = torch.ones_like(positive)
        ignored = inside_ignored(batch, self.cells(batch))
        if ignored is not None:
            counted = positive | ~ignored
        image, cell = positive.nonzero().unbind(1)
        row = matched[image, cell]
        focal = focal_loss(logits, counted.float(), image, cell, truth.labels[image, row])
        count = positive.sum()
        parts = zip(outputs["kernels"].unbind(), outputs["mask_features"].unbind(), strict=True)
        dice = [self._dice(*both, image, cell, row, batch) for both in parts]
        return {
            "classification": focal / avg_factor(count, more=1.0),
            "mask": MASK_WEIGHT * torch.stack(dice) / avg_factor(count),
        }

    def _dice(
        self, all_kernels: Tensor, mask_features: Tensor, image: Tensor, cell: Tensor, row: Tensor, batch: Batch
    ) -> Tensor:
        """Sum of the dice losses of the positive cells (images ascending) for the outputs of one pyramid."""
        targets = coarse_masks(batch).split(batch.counts)
        total = (all_kernels.sum() + mask_features.sum()) * 0.0  # all parameters stay in the graph
        for index, count in enumerate(torch.bincount(image, minlength=len(batch)).tolist()):
            current, cell = cell[:count], cell[count:]
            instance, row = row[:count], row[count:]
            if count:
                features = mask_features[index]
                logits = (all_kernels[index, current] @ features.flatten(1)).unflatten(1, features.shape[1:])
                total = total + dice_loss(logits, targets[index][instance]).sum()
        return total

    def cells(self, batch: Batch) -> Tensor:
        """[S, 4] xyxy in pixels: the cells of all grids in row-major order."""
        height, width = batch.padded_size
        grids = []
        for cells in self.config.grids:
            y, x = torch.meshgrid(*[torch.arange(cells, device=batch.boxes.device)] * 2, indexing="ij")
            corner = torch.stack([x, y, x + 1, y + 1], -1).flatten(0, 1)
            grids.append(corner * torch.tensor([width, height] * 2, device=corner.device) / cells)
        return torch.cat(grids)

    @torch.no_grad()
    def assign(self, truth: PaddedBoxes, batch: Batch) -> Tensor:
        """The row of `truth` assigned to each cell, or BACKGROUND: [B, S] int64."""
        centers, seen = self._centers(truth, batch)
        wh = truth.boxes[..., 2:] - truth.boxes[..., :2]  # [B, K, 2]
        area, padded = wh.prod(-1), torch.tensor(batch.padded_size[::-1], device=wh.device)
        half_region, assigned = wh * (CENTER / 2), []
        for level, cells in enumerate(self.config.grids):
            lower = 0.0 if level == 0 else self.base / 2 * self.strides[level]
            upper = float("inf") if level == len(self.strides) - 1 else self.base * 2 * self.strides[level]
            in_range = seen & (area.sqrt() >= lower) & (area.sqrt() <= upper)
            middle, first, last = (
                (at / padded * cells).floor() for at in (centers, centers - half_region, centers + half_region)
            )
            first = torch.maximum(first, middle - 1).clamp(min=0)[..., None, :]  # [B, K, 1, 2]
            last = torch.minimum(last, middle + 1).clamp(max=cells - 1)[..., None, :]
            index = torch.arange(cells, device=wh.device)[:, None]  # [cells, 1], compared with x and with y
            x, y = ((index >= first) & (index <= last)).unbind(-1)  # [B, K, cells]
            inside = (y[..., None] & x[..., None, :]).flatten(2) & in_range[..., None]  # [B, K, cells^2]
            smallest, row = torch.where(inside, area[..., None], float("inf")).min(1)
            assigned.append(torch.where(smallest.isinf(), BACKGROUND, row))
        return torch.cat(assigned, 1)

    def _centers(self, truth: PaddedBoxes, batch: Batch) -> tuple[Tensor, Tensor]:
        """Centres of mass [B, K, 2] of the masks in pixels, and which rows have a mask [B, K]."""
        masks, means = batch.masks, []
        assert masks is not None  # see require_masks
        area = masks.sum((1, 2))
        for axis, length in ((1, masks.shape[2]), (2, masks.shape[1])):
            pixel_center = torch.arange(length, device=masks.device) + 0.5
            means.append((masks.sum(axis) * pixel_center).sum(1) / area.clamp(min=1))
        centers = torch.zeros(*truth.valid.shape, 2, device=masks.device)
        seen = torch.zeros_like(truth.valid)
        centers[truth.valid] = torch.stack(means, 1).float()  # rows of `truth` are the batch's boxes in their order
        seen[truth.valid] = area > 0
        return centers, seen

    @torch.no_grad()
    def detect(self, pyramid: list[Tensor], batch: Batch) -> list[Detections]:
        outputs = self.head(pyramid)
        with full_precision(pyramid[0]):
            outputs = {name: value.float() for name, value in outputs.items()}
            return [
                detect_instances({name: value[image] for name, value in outputs.items()}, size, self.config)
                for image, size in enumerate(batch.image_sizes.tolist())
            ]
