"""torchvision's MobileNetV2 as a backbone."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor
from torchvision.models import MobileNetV2

from fastkd.detectors.backbones.base import NORM_LAYERS, Backbone

LAST = (3, 6, 13, 17)  # last block of strides 4, 8, 16, 32, with 24, 32, 96 and 320 channels


class MobileNet(Backbone, MobileNetV2):
    """MobileNetV2 without its last 1x1 convolution and its classifier; state-dict keys are torchvision's.

    Args:
        width: factor on all widths; results are rounded to multiples of 8.
        norm: "frozen_bn", "bn" or "gn".
        frozen_stages: how many of (stride 2, 4, 8, 16, 32) never train.
    """

    features: Any  # untyped in torchvision: a Sequential of blocks

    def __init__(self, width: float, norm: str, frozen_stages: int):
        MobileNetV2.__init__(self, width_mult=width, norm_layer=NORM_LAYERS[norm])
        del self.classifier, self.features[LAST[-1] + 1]
        self.out_channels = [self.features[index].out_channels for index in LAST]
        ends = (-1, 1, *LAST)
        stages = [[f"features.{i}" for i in range(before + 1, last + 1)] for before, last in itertools.pairwise(ends)]
        self.freeze(stages, frozen_stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps C2 .. C5 (strides 4, 8, 16, 32) of images [B, 3, H, W]."""
        maps, x = [], images
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in LAST:
                maps.append(x)
        return maps
