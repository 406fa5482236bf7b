"""CondInst's head: FCOS's towers, a controller that predicts the mask head of each location, and the mask branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.detectors.backbones.base import group_norm
from fastkd.detectors.common.instance_masks import aligned_upsample
from fastkd.detectors.common.locations import LocationHead
from fastkd.detectors.config import DetectorConfig

MASK_CHANNELS = 8  # channels of the mask features and of the hidden layers of a mask head
WEIGHTS = ((MASK_CHANNELS, MASK_CHANNELS + 2), (MASK_CHANNELS, MASK_CHANNELS), (1, MASK_CHANNELS))
PARAMETERS = sum(rows * columns + rows for rows, columns in WEIGHTS)  # 169
LEVELS = 3  # the mask features are computed from P3, P4, P5


class MaskBranch(nn.Module):
    """P3, P4, P5 -> mask features [B, 8, H_3, W_3]."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        norm = group_norm if config.head_norm == "gn" else nn.BatchNorm2d
        width = config.mask_branch_channels
        self.refine = nn.ModuleList(_block(config.channels, width, norm) for _ in range(LEVELS))
        self.tower = nn.Sequential(
            *(_block(width, width, norm) for _ in range(4)), nn.Conv2d(width, MASK_CHANNELS, kernel_size=1)
        )

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        height, width = pyramid[0].shape[-2:]
        total = self.refine[0](pyramid[0])
        for power, (refine, level) in enumerate(zip(self.refine[1:], pyramid[1:LEVELS], strict=True), 1):
            total = total + aligned_upsample(refine(level), 2**power)[..., :height, :width]
        return self.tower(total)


def _block(in_channels: int, channels: int, norm) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, norm(channels), nn.ReLU())


class CondInstHead(LocationHead):
    """FCOS's outputs, `controller` [B, A, 169] and `mask_features` [B, 8, H_3, W_3]."""

    more: dict[str, int] = {"bbox_ctrness": 1, "controller": PARAMETERS}  # noqa: RUF012 - read only

    def __init__(self, config: DetectorConfig):
        super().__init__(config)
        self.mask_branch = MaskBranch(config)

    def forward(self, pyramid: list[Tensor]) -> dict[str, Tensor]:
        return super().forward(pyramid) | {"mask_features": self.mask_branch(pyramid)}


def dynamic_masks(features: Tensor, parameters: Tensor, origins: Tensor, scales: Tensor, stride: int) -> Tensor:
    """Mask logits of the instances of one image: three 1x1 convolutions per instance on [coordinates | features].

    The coordinates of cell (y, x) for an instance at (ox, oy) are ((x', y') - (ox, oy)) / scale, with the cell's
    centre (x', y') in pixels. They enter the first layer as an outer sum, so that no tensor of N * 10 maps is made.

    Args:
        features: [8, h, w] of the image.
        parameters: [N, 169]: weights of the layers [8, 2 + 8], [8, 8], [1, 8], then their biases.
        origins: [N, 2] (x, y) in pixels.
        scales: [N] size of interest of the instance's level, pixels.
        stride: pixels between cells of the features.
    Returns: [N, h, w] logits.
    """
    count, (channels, height, width) = len(parameters), features.shape
    sizes = [rows * columns for rows, columns in WEIGHTS] + [rows for rows, _ in WEIGHTS]
    parts = parameters.split(sizes, 1)
    first, second, third = (part.view(count, *shape) for part, shape in zip(parts, WEIGHTS))
    biases = parts[len(WEIGHTS) :]
    x, y = (torch.arange(n, device=features.device) * stride + stride // 2 for n in (width, height))
    x = (x - origins[:, :1]) / scales[:, None]  # [N, w]
    y = (y - origins[:, 1:]) / scales[:, None]  # [N, h]
    by_x = first[:, :, 0, None] * x[:, None]  # [N, 8, w]
    by_y = first[:, :, 1, None] * y[:, None] + biases[0][..., None]  # [N, 8, h]
    hidden = (first[:, :, 2:].flatten(0, 1) @ features.flatten(1)).view(count, channels, height, width)
    hidden = F.relu(hidden + by_x[:, :, None, :] + by_y[..., None]).flatten(2)
    hidden = F.relu(torch.baddbmm(biases[1][..., None], second, hidden))
    return torch.baddbmm(biases[2][..., None], third, hidden).view(count, height, width)
