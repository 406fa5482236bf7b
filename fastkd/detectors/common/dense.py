"""Parts shared by the one-stage detectors: pyramid anchors, and detections from head outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import batched_nms

from fastkd.detectors.config import DetectorConfig
from fastkd.types import Batch, Detections


class PyramidAnchors:
    """Anchors of whole pyramids by torchvision's AnchorGenerator, with a small cache of grids.

    The distance between cells is the level's stride. torchvision's models use padded size // cells instead. Both agree
    if the padded size is a multiple of the coarsest stride; otherwise torchvision's anchors of an image depend on the
    sizes of the other images in the batch.

    Args:
        sizes: sides of the square anchors of each level, pixels.
        ratios: height / width.
        strides: pixels between cells, level by level.
        centered: anchor anchors around cell centres (floor(stride / 2) + index * stride) instead of around their upper
            left corners (torchvision).
        rounding: round the corners to whole pixels, as torchvision does.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[float, ...]],
        ratios: tuple[float, ...],
        strides: tuple[int, ...],
        *,
        centered: bool = False,
        rounding: bool = True,
    ):
        self.generator = AnchorGenerator(tuple(sizes), (tuple(ratios),) * len(sizes))
        if not rounding:
            self.generator.cell_anchors = [_exact_anchors(level, ratios) for level in sizes]
        self.strides = strides
        self.offsets = [stride // 2 if centered else 0 for stride in strides]
        self._known: dict[tuple, list[Tensor]] = {}

    @property
    def cells(self) -> list[Tensor]:
        """L tensors [A, 4]: the anchors of the cell at the origin."""
        return [anchors + offset for anchors, offset in zip(self.generator.cell_anchors, self.offsets)]

    @property
    def per_cell(self) -> int:
        """Number of anchors of one cell."""
        return len(self.generator.cell_anchors[0])

    def __call__(self, pyramid: list[Tensor]) -> list[Tensor]:
        """L tensors [H_l * W_l * A, 4] float32 on the pyramid's device, cells in row-major order."""
        key = (pyramid[0].device, *(tuple(level.shape[-2:]) for level in pyramid))
        if key not in self._known:
            if len(self._known) >= 8:
                self._known.pop(next(iter(self._known)))
            self.generator.set_cell_anchors(torch.float32, pyramid[0].device)
            grids = [list(level.shape[-2:]) for level in pyramid]
            corners = self.generator.grid_anchors(grids, [[stride, stride] for stride in self.strides])
            self._known[key] = [anchors + offset for anchors, offset in zip(corners, self.offsets)]
        return self._known[key]


def _exact_anchors(sizes: tuple[float, ...], ratios: tuple[float, ...]) -> Tensor:
    """torchvision's anchors of one cell before rounding, [len(ratios) * len(sizes), 4], ratio by ratio."""
    root = torch.tensor(ratios, dtype=torch.float64).sqrt()[:, None]
    sides = torch.tensor(sizes, dtype=torch.float64)[None]
    half = torch.stack([sides / root, sides * root], -1).flatten(0, 1) / 2  # [A, 2] width, height
    return torch.cat([-half, half], 1).float()


def highest_by_cell(logits: Tensor, pyramid: list[Tensor]) -> list[Tensor]:
    """Highest class probability of each cell, from logits [B, N, classes] of anchors, cells in row-major order.

    Returns: L tensors [B, 1, H_l, W_l] float32.
    """
    sizes = [tuple(level.shape[-2:]) for level in pyramid]
    cells = [rows * columns for rows, columns in sizes]
    highest = logits.unflatten(1, (sum(cells), -1)).flatten(2).amax(2).float().sigmoid()  # [B, cells]
    return [level.unflatten(1, (1, *size)) for level, size in zip(highest.split(cells, dim=1), sizes, strict=True)]


def image_limits(batch: Batch) -> Tensor:
    """[B, 1, 4] float32 (width, height, width, height) of the images before padding."""
    return batch.image_sizes.flip(1).repeat(1, 2)[:, None].to(batch.images.device, torch.float32)


def clip_boxes(boxes: Tensor, batch: Batch) -> Tensor:
    """Boxes [B, N, 4] with corners clamped to their image."""
    return torch.minimum(boxes.clamp(min=0), image_limits(batch))


class Candidates(NamedTuple):
    """Input of non-maximum suppression: boxes [B, N, 4] clipped to the images; scores, labels, anchor index [B, N].

    A negative score marks an empty entry. The anchor index runs over the concatenated levels.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    anchor: Tensor


@torch.no_grad()
def dense_candidates(
    scores: list[Tensor], decode: Callable[[int, Tensor], Tensor], batch: Batch, config: DetectorConfig
) -> Candidates:
    """The highest-scoring boxes of each level.

    Args:
        scores: L tensors [B, N_l, num_classes] float32.
        decode: (level, index [B, M]) -> boxes [B, M, 4] of the level's anchors at these indices.
    """
    kept_scores, kept_labels, kept_boxes, kept_indices, first = [], [], [], [], 0
    for level, level_scores in enumerate(scores):
        flat = level_scores.flatten(1)
        flat = flat.masked_fill(~(flat > config.score_threshold), -1.0)  # also drops NaN
        best, index = flat.topk(min(config.candidates_per_level, flat.shape[1]), dim=1)
        used = max(1, int((best > 0).sum(1).max()))  # the remaining columns are empty in all images
        best, index = best[:, :used], index[:, :used]
        anchor = index // level_scores.shape[-1]
        kept_scores.append(best)
        kept_labels.append(index % level_scores.shape[-1])
        kept_boxes.append(decode(level, anchor))
        kept_indices.append(anchor + first)
        first += level_scores.shape[1]
    boxes = clip_boxes(torch.cat(kept_boxes, 1), batch)
    return Candidates(boxes, torch.cat(kept_scores, 1), torch.cat(kept_labels, 1), torch.cat(kept_indices, 1))


def dense_detections(
    scores: list[Tensor], decode: Callable[[int, Tensor], Tensor], batch: Batch, config: DetectorConfig
) -> list[Detections]:
    """`dense_candidates` after class-wise non-maximum suppression; same arguments."""
    best = dense_candidates(scores, decode, batch, config)
    return suppress(best.boxes, best.scores, best.labels, config)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, config: DetectorConfig) -> list[Detections]:
    """Non-maximum suppression of boxes [B, N, 4], scores and labels [B, N]; a negative score marks an empty entry."""
    return [
        Detections(image_boxes[kept], image_scores[kept], image_labels[kept])
        for kept, image_boxes, image_scores, image_labels in zip(
            nms_indices(boxes, scores, labels, config), boxes, scores, labels, strict=True
        )
    ]


def nms_indices(boxes: Tensor, scores: Tensor, labels: Tensor, config: DetectorConfig) -> list[Tensor]:
    """B index tensors of the detections that non-maximum suppression keeps, strongest first; arguments as `suppress`.

    Without a threshold (POTO), the highest scores are kept.
    """
    kept, threshold = [], config.nms
    for image_boxes, image_scores, image_labels in zip(boxes, scores, labels, strict=True):
        used = (image_scores > 0).nonzero()[:, 0]
        valid_scores = image_scores[used]
        if threshold is None:
            order = valid_scores.argsort(descending=True, stable=True)
        else:
            order = batched_nms(image_boxes[used], valid_scores, image_labels[used], threshold)
        kept.append(used[order[: config.detections_per_image]])
    return kept
