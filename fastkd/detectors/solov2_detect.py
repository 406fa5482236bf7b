"""Converts SOLOv2's outputs to instances: candidates, their masks, matrix NMS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.detectors.common.instance_masks import MASK_STRIDE, MASKS_AT_ONCE
from fastkd.detectors.config import DetectorConfig
from fastkd.types import Detections

MASK_THRESHOLD = 0.5
CANDIDATES = 500  # masks that enter matrix NMS
SIGMA = 2.0
KERNELS_AT_ONCE = 128
CELL_STRIDES = (8, 8, 16, 32, 32)  # by level; masks with fewer cells than this are dropped


def point_max(scores: Tensor) -> Tensor:
    """Scores [C, S, S], set to 0 where one of the three neighbours above and to the left is higher."""
    highest = F.max_pool2d(scores[None], kernel_size=2, stride=1, padding=1)[0, :, :-1, :-1]
    return scores * (highest == scores)


def detect_instances(outputs: dict[str, Tensor], size: list[int], config: DetectorConfig) -> Detections:
    """The instances of one image.

    Args:
        outputs: `cls_logits` [S, classes], `kernels` [S, E], `mask_features` [E, h, w], float32.
        size: (height, width) of the image before padding.
    """
    scores, labels, cells, least = _candidates(outputs["cls_logits"], config)
    kernels, features = outputs["kernels"][cells], outputs["mask_features"]
    measured = [_measure(some, features) for some in kernels.split(KERNELS_AT_ONCE)]
    area, probability = (torch.cat(parts) for parts in zip(*measured, strict=True))
    scores = (scores * probability).masked_fill(area <= least, 0.0)
    order = scores.argsort(descending=True, stable=True)[:CANDIDATES]
    order = order[scores[order] > 0]
    scores, labels, kernels = scores[order], labels[order], kernels[order]
    scores = scores * matrix_nms((_soft(kernels, features) > MASK_THRESHOLD).float().flatten(1), labels)
    kept = scores.argsort(descending=True, stable=True)[: config.detections_per_image]
    kept = kept[scores[kept] > config.score_threshold]
    masks = _full_size(kernels[kept], features, size)
    boxes, seen = boxes_of(masks)
    return Detections(boxes[seen], scores[kept][seen], labels[kept][seen], masks[seen])


def _candidates(logits: Tensor, config: DetectorConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, labels, cells and minimum areas of the candidates above the first threshold."""
    parts, first = [], 0
    for side, stride in zip(config.grids, CELL_STRIDES, strict=True):
        scores = logits[first : first + side * side].sigmoid()
        scores = point_max(scores.T.unflatten(1, (side, side))).flatten(1).T.flatten()  # [side^2 * classes]
        best, index = scores.topk(min(config.candidates_per_level, len(scores)))
        used = best > 2 * config.score_threshold
        best, index = best[used], index[used]
        cell = index // logits.shape[1] + first
        parts.append((best, index % logits.shape[1], cell, torch.full_like(best, stride)))
        first += side * side
    scores, labels, cells, strides = (torch.cat(columns) for columns in zip(*parts))
    return scores, labels, cells, strides


def _soft(kernels: Tensor, features: Tensor) -> Tensor:
    return (kernels @ features.flatten(1)).sigmoid().unflatten(1, features.shape[1:])


def _measure(kernels: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Number of cells of each mask, and their mean probability."""
    soft = _soft(kernels, features).flatten(1)
    inside = (soft > MASK_THRESHOLD).float()
    area = inside.sum(1)
    return area, (soft * inside).sum(1) / area.clamp(min=1)


def matrix_nms(masks: Tensor, labels: Tensor) -> Tensor:
    """The factor [N] on each score: min over stronger masks i of its class of exp(-2 iou_ij^2) / exp(-2 worst_i^2).

    worst_i is the largest IoU of mask i with a mask stronger than i.

    Args:
        masks: [N, cells] of 0 and 1, strongest first.
        labels: [N].
    """
    if not len(masks):
        return masks.new_zeros(0)
    overlap, area = masks @ masks.T, masks.sum(1)
    iou = overlap / (area[:, None] + area - overlap)
    iou = (iou * (labels[:, None] == labels)).triu(diagonal=1)  # [i, j], i stronger than j
    worst = iou.amax(0)
    return torch.exp(SIGMA * (worst[:, None].square() - iou.square())).amin(0)


def _full_size(kernels: Tensor, features: Tensor, size: list[int]) -> Tensor:
    """Masks [N, height, width] bool of the image."""
    masks = [torch.zeros(0, *size, dtype=torch.bool, device=features.device)]
    for some in kernels.split(MASKS_AT_ONCE):
        if len(some):
            soft = F.interpolate(
                _soft(some, features)[:, None], scale_factor=MASK_STRIDE, mode="bilinear", align_corners=False
            )
            masks.append(soft[:, 0, : size[0], : size[1]] > MASK_THRESHOLD)
    return torch.cat(masks)


def boxes_of(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [N, 4] float32 xyxy around masks [N, h, w] bool, and which masks have any pixel [N]."""
    sides = []
    for axis in (1, 2):
        used = masks.any(axis)  # [N, w], then [N, h]
        length = used.shape[1]
        index = torch.arange(length, device=masks.device)
        first = torch.where(used, index, length).amin(1) if length else index.new_zeros(len(masks))
        last = torch.where(used, index + 1, 0).amax(1) if length else first
        sides.append((first, last))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], 1).float(), masks.flatten(1).any(1)
