"""SOLOv2's head: class logits and kernels for a grid of cells, and the mask features the kernels are applied to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.detectors.backbones.base import group_norm
from fastkd.detectors.common.locations import by_location, predictor, tower
from fastkd.detectors.config import DetectorConfig

MASK_LEVELS = 4  # the mask features are computed from P2 .. P5


def with_coordinates(maps: Tensor) -> Tensor:
    """Maps [B, C, h, w] with two more channels: x and y from -1 at the first to 1 at the last cell."""
    batch, _, height, width = maps.shape
    y, x = (torch.linspace(-1, 1, n, device=maps.device, dtype=maps.dtype) for n in (height, width))
    x, y = x.expand(batch, 1, height, width), y[:, None].expand(batch, 1, height, width)
    return torch.cat([maps, x, y], 1)


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps resized bilinearly."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class GridTowers(nn.Module):
    """Class logits [B, S, classes] and kernels [B, S, kernel_channels] of the cells of all levels' grids."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.grids = config.grids
        width = config.instance_head_channels
        self.kernel_tower = tower(config.channels + 2, width, config.head_convs)
        self.class_tower = tower(config.channels, width, config.head_convs)
        self.kernels = predictor(width, config.kernel_channels)
        self.cls_logits = predictor(width, config.num_classes, prior=True)

    def forward(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        finest, *middle, coarsest = pyramid
        halved = [max(1, side // 2) for side in finest.shape[-2:]]
        levels = [resized(finest, halved), *middle, resized(coarsest, middle[-1].shape[-2:])]
        logits, kernels = [], []
        for level, cells in zip(levels, self.grids, strict=True):
            features = resized(with_coordinates(level), (cells, cells))
            kernels.append(by_location(self.kernels(self.kernel_tower(features))))
            logits.append(by_location(self.cls_logits(self.class_tower(features[:, :-2]))))
        return torch.cat(logits, 1), torch.cat(kernels, 1)


class MaskFeatures(nn.Module):
    """P2 .. P5 -> mask features [B, kernel_channels, H_2, W_2]."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        width = config.mask_branch_channels
        self.paths = nn.ModuleList()
        for level in range(MASK_LEVELS):
            first = config.channels + (2 if level == MASK_LEVELS - 1 else 0)
            self.paths.append(
                nn.ModuleList(tower(first if step == 0 else width, width, 1) for step in range(max(1, level)))
            )
        conv = nn.Conv2d(width, config.kernel_channels, kernel_size=1, bias=False)
        nn.init.normal_(conv.weight, std=0.01)
        self.merge = nn.Sequential(conv, group_norm(config.kernel_channels), nn.ReLU())

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        sizes = [level.shape[-2:] for level in pyramid[:MASK_LEVELS]]
        total: Tensor | None = None
        for index, (path, level) in enumerate(zip(self.paths, pyramid[:MASK_LEVELS], strict=True)):
            maps = with_coordinates(level) if index == MASK_LEVELS - 1 else level
            for step, block in enumerate(path.children()):
                maps = block(maps)
                if index > 0:
                    maps = resized(maps, sizes[index - 1 - step])
            total = maps if total is None else total + maps
        return self.merge(total)


class SOLOv2Head(nn.Module):
    """The raw outputs by name: `cls_logits`, `kernels` and `mask_features`."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.instance_head = GridTowers(config)
        self.mask_head = MaskFeatures(config)

    def forward(self, pyramid: list[Tensor]) -> dict[str, Tensor]:
        logits, kernels = self.instance_head(pyramid)
        return {"cls_logits": logits, "kernels": kernels, "mask_features": self.mask_head(pyramid)}
