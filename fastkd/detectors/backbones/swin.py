"""torchvision's Swin-T as a backbone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import SwinTransformer

from fastkd.detectors.backbones.base import Backbone

HEADS = (3, 6, 12, 24)
PATCH = 4


class SwinTiny(Backbone, SwinTransformer):
    """Swin-T without its classifier, with a LayerNorm on each output map; keys of `features` are torchvision's.

    Args:
        width: factor on 96, 192, 384, 768; the first is rounded to a multiple of 24, so that each of its 3 heads has a
            multiple of 8 channels.
        frozen_stages: how many of (patch embedding, stage 1 .. stage 4) are frozen.
        first: index of the first map in use; maps before it have no norm.
    """

    features: nn.Sequential  # untyped in torchvision
    fresh = tuple(f"out_norms.{index}.{name}" for index in range(4) for name in ("weight", "bias"))

    def __init__(self, width: float, frozen_stages: int, first: int):
        channels = 24 * max(1, round(96 * width / 24))
        SwinTransformer.__init__(
            self,
            patch_size=[PATCH, PATCH],
            embed_dim=channels,
            depths=[2, 2, 6, 2],
            num_heads=list(HEADS),
            window_size=[7, 7],
            stochastic_depth_prob=0.2,
            num_classes=1,
        )
        del self.norm, self.permute, self.avgpool, self.flatten, self.head
        self.out_channels = [channels * 2**stage for stage in range(4)]
        self.out_norms = nn.ModuleList(
            nn.LayerNorm(width) if stage >= first else nn.Identity() for stage, width in enumerate(self.out_channels)
        )
        # features: embedding, stage, then three times patch merging and stage
        stages = (("features.0",), ("features.1",), *((f"features.{i}", f"features.{i + 1}") for i in (2, 4, 6)))
        self.freeze(stages, frozen_stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps C2 .. C5 (strides 4, 8, 16, 32) of images [B, 3, H, W]; odd sizes are padded with zeros."""
        height, width = images.shape[-2:]
        maps, x = [], F.pad(images, (0, -width % PATCH, 0, -height % PATCH))
        for index, layer in enumerate(self.features):
            x = layer(x)  # [B, H, W, C]
            if index % 2:
                maps.append(self.out_norms[index // 2](x).permute(0, 3, 1, 2))
        return maps
