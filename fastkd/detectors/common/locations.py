"""Base class and head of FCOS, ATSS, POTO and CondInst, which predict one box per pyramid location."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder

from fastkd.detectors.backbones.base import group_norm
from fastkd.detectors.backbones.resnet import build_backbone_and_neck
from fastkd.detectors.common.dense import PyramidAnchors, dense_detections, highest_by_cell
from fastkd.detectors.common.targets import PaddedBoxes, inside_ignored
from fastkd.detectors.config import DetectorConfig
from fastkd.detectors.protocol import Detector, concat_pyramids, split_losses
from fastkd.ops._support.coverage import full_precision
from fastkd.ops.focal_loss import focal_loss
from fastkd.types import Batch, Detections

PRIOR = 0.01  # initial probability of every class


class Matches(NamedTuple):
    """The assignment of locations to ground truth: rows [B, A] of the padded boxes, or BACKGROUND.

    And the P positive locations: image [P] (ascending), location [P], row [P].
    """

    rows: Tensor
    image: Tensor
    location: Tensor
    row: Tensor

    @staticmethod
    def of(rows: Tensor) -> Matches:
        """Matches from the result of `assign`; waits for the device once."""
        image, location = (rows >= 0).nonzero().unbind(1)
        return Matches(rows, image, location, rows[image, location])


class LocationDetector(Detector):
    """A detector that predicts classes and one box, as distances to its distances, for each location of P3 .. P7.

    The anchors are squares of one stride around the locations. The head's outputs are `cls_logits` [B, A, classes],
    `bbox_regression` [B, A, 4] (left, top, right, bottom in strides) and further outputs of the detector.
    """

    head_class: type[nn.Module]
    head: Any  # a LocationHead, or torchvision's of FCOS
    centered = True  # locations are cell centres; FCOS uses the upper left corners, as torchvision does

    def __init__(self, config: DetectorConfig):
        super().__init__(config, *build_backbone_and_neck(config), self.head_class(config))
        self.size_of_interest = config.anchor_base if config.anchor_base is not None else 8
        sizes = [(stride,) for stride in config.strides]
        self.anchors = PyramidAnchors(sizes, (1.0,), config.strides, centered=self.centered)
        self.box_coder = BoxLinearCoder(normalize_by_size=True)

    def imitation_anchors(self) -> list[Tensor]:
        squares = []
        for cell, stride in zip(self.anchors.cells, self.strides, strict=True):
            middle, half = (cell[:, :2] + cell[:, 2:]) / 2, self.size_of_interest * stride / 2
            squares.append(torch.cat([middle - half, middle + half], 1))
        return squares

    def cell_scores(self, pyramid: list[Tensor]) -> list[Tensor]:
        return highest_by_cell(self.head.classification_head(pyramid), pyramid)

    def losses(self, pyramids: list[list[Tensor]], batch: Batch) -> list[dict[str, Tensor]]:
        """`loss` of several pyramids: one call of the head on all their images."""
        outputs = self.head(concat_pyramids(pyramids))
        with full_precision(pyramids[0][0]):
            shape = (len(pyramids), len(batch))
            outputs = {name: value.float().unflatten(0, shape) for name, value in outputs.items()}
            return split_losses(self._losses(outputs, pyramids[0], batch))

    @abstractmethod
    def _losses(self, outputs: dict[str, Tensor], pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """Losses [R] from the head's float32 outputs [R, B, ...] for R pyramids of the shapes of `pyramid`."""

    def _scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """[B, A, classes] float32."""
        return (outputs["cls_logits"].float().sigmoid() * outputs["bbox_ctrness"].float().sigmoid()).sqrt()

    def _classification(
        self, logits: Tensor, matches: Matches, anchors: Tensor, truth: PaddedBoxes, batch: Batch
    ) -> Tensor:
        """Focal loss of logits [..., B, A, classes], summed over locations outside ignore regions: [...]."""
        counted = torch.ones_like(matches.rows, dtype=torch.bool)
        ignored = inside_ignored(batch, anchors)
        if ignored is not None:
            counted = (matches.rows >= 0) | ~ignored
        label = truth.labels[matches.image, matches.row]
        return focal_loss(logits, counted.float(), matches.image, matches.location, label)

    @torch.no_grad()
    def detect(self, pyramid: list[Tensor], batch: Batch) -> list[Detections]:
        outputs = self.head(pyramid)
        with full_precision(pyramid[0]):
            return dense_detections(*self._scores_and_decoder(outputs, pyramid), batch, self.config)

    def _scores_and_decoder(
        self, outputs: dict[str, Tensor], pyramid: list[Tensor]
    ) -> tuple[list[Tensor], Callable[[int, Tensor], Tensor]]:
        """The arguments scores and decode of `dense_detections`."""
        anchors = self.anchors(pyramid)
        sizes = [len(level) for level in anchors]
        distances = outputs["bbox_regression"].float().split(sizes, dim=1)

        def decode(level: int, index: Tensor) -> Tensor:
            chosen = distances[level].gather(1, index[..., None].expand(-1, -1, 4))
            return self.box_coder.decode(chosen, anchors[level][index])

        return list(self._scores(outputs).split(sizes, dim=1)), decode


def binary_errors(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of logits [R, P] with a target [P], summed over P: [R]."""
    return F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none").sum(1)


def centerness(ltrb: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of positive distances (l, t, r, b) [..., 4]."""
    horizontal, vertical = ltrb[..., [0, 2]], ltrb[..., [1, 3]]
    ratio = horizontal.amin(-1) / horizontal.amax(-1) * (vertical.amin(-1) / vertical.amax(-1))
    return torch.sqrt(ratio)


def candidate_cells(points: Tensor, grid: Sequence[int], stride: int, size: int) -> Tensor:
    """The cells of a grid in a window around points.

    The window has `size` cells per side (fewer if the grid is smaller) and is shifted to lie in the grid. It contains
    the `size` cells whose centres are nearest to the point and, for odd sizes, all cells within size / 2 strides of it
    along both axes.

    Args:
        points: [..., 2] (x, y) in pixels.
        grid: (H, W) of the level.
        stride: pixels between cells.
        size: odd.
    Returns: [..., N] int64, y * W + x.
    """
    axes = []
    for side, cells in enumerate(reversed(grid)):
        length = min(size, cells)
        nearest = ((points[..., side] - stride // 2) / stride).round().long()
        start = (nearest - size // 2).clamp(min=0).clamp(max=cells - length)
        axes.append(start[..., None] + torch.arange(length, device=points.device))
    x, y = axes
    return (y[..., :, None] * grid[1] + x[..., None, :]).flatten(-2)


def tower(in_channels: int, channels: int, convs: int) -> nn.Sequential:
    """conv3x3, GroupNorm and ReLU, `convs` times."""
    layers: list[nn.Module] = []
    for index in range(convs):
        conv = nn.Conv2d(channels if index else in_channels, channels, 3, padding=1)
        layers += [_small(conv), group_norm(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def predictor(in_channels: int, out_channels: int, *, prior: bool = False) -> nn.Conv2d:
    """The last convolution of a tower; with `prior` its sigmoid is initialised to 0.01."""
    conv = _small(nn.Conv2d(in_channels, out_channels, 3, padding=1))
    if prior and conv.bias is not None:
        nn.init.constant_(conv.bias, -math.log((1 - PRIOR) / PRIOR))
    return conv


def _small(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def by_location(level: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C]."""
    return level.flatten(2).transpose(1, 2)


class ClassTower(nn.Module):
    """Class logits [B, A, classes] of a pyramid; names as in torchvision's FCOS."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.conv = tower(config.channels, config.channels, config.head_convs)
        self.cls_logits = predictor(config.channels, config.num_classes, prior=True)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        return torch.cat([by_location(self.cls_logits(self.conv(level))) for level in pyramid], 1)


class BoxTower(nn.Module):
    """Distances to the sides of a box in strides, ReLU(scale_l * (1 + conv)), and further outputs of the tower.

    Each level has a learned scale. Distances are initialised near one stride, where the slope of ReLU is not 0.

    Args:
        more: channels of the further outputs by name.
    """

    def __init__(self, config: DetectorConfig, more: dict[str, int]):
        super().__init__()
        self.conv = tower(config.channels, config.channels, config.head_convs)
        self.bbox_reg = predictor(config.channels, 4)
        if self.bbox_reg.bias is not None:
            nn.init.ones_(self.bbox_reg.bias)
        self.scales = nn.Parameter(torch.ones(len(config.strides)))
        self.more = tuple(more)
        for name, channels in more.items():
            self.add_module(name, predictor(config.channels, channels))

    def forward(self, pyramid: list[Tensor]) -> dict[str, Tensor]:
        outputs: dict[str, list[Tensor]] = {name: [] for name in ("bbox_regression", *self.more)}
        for level, scale in zip(pyramid, self.scales, strict=True):
            features = self.conv(level)
            outputs["bbox_regression"].append(by_location(torch.relu(self.bbox_reg(features) * scale)))
            for name in self.more:
                outputs[name].append(by_location(self.get_submodule(name)(features)))
        return {name: torch.cat(levels, 1) for name, levels in outputs.items()}


class LocationHead(nn.Module):
    """Class tower and box tower; names as in torchvision's FCOS, so that weights can be inherited between detectors."""

    more: dict[str, int] = {"bbox_ctrness": 1}  # noqa: RUF012 - read only

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.classification_head = ClassTower(config)
        self.regression_head = BoxTower(config, self.more)

    def forward(self, pyramid: list[Tensor]) -> dict[str, Tensor]:
        """The raw outputs by name."""
        return {"cls_logits": self.classification_head(pyramid), **self.regression_head(pyramid)}
