"""torchvision's ResNets of any width, and the feature pyramid on top."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from fastkd.detectors.config import DetectorConfig

_BLOCKS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


def _frozen_batch_norm(channels: int) -> nn.Module:
    return FrozenBatchNorm2d(channels, eps=1e-5)  # as BatchNorm2d in eval mode; torchvision's own default is 0


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or fewer so that each has at least two channels (the coarsest map may have one cell)."""
    return nn.GroupNorm(math.gcd(32, max(channels // 2, 1)), channels)


_NORM_LAYERS = {"frozen_bn": _frozen_batch_norm, "bn": nn.BatchNorm2d, "gn": group_norm}


class ScaledResNet(ResNet):
    """A torchvision ResNet without its classifier, all widths scaled; state-dict keys are torchvision's.

    Args:
        name: "resnet18", "resnet34", "resnet50" or "resnet101".
        width: factor on 64, 128, 256, 512; results are rounded to multiples of 8, at least 8.
        norm: "frozen_bn", "bn" or "gn".
        frozen_stages: how many of (stem, layer1 .. layer4) never train; their BatchNorms keep their statistics.
        stride_in_1x1: bottlenecks halve the map in their first convolution, not in the second.
    """

    def __init__(
        self,
        name: str,
        width: float = 1.0,
        norm: str = "frozen_bn",
        frozen_stages: int = 0,
        stride_in_1x1: bool = False,
    ):
        nn.Module.__init__(self)  # ResNet's own constructor fixes the widths; what follows is its body
        block, depths = _BLOCKS[name]
        widths = [max(8, 8 * round(base * width / 8)) for base in (64, 128, 256, 512)]
        self._norm_layer = _NORM_LAYERS[norm]
        self.inplanes, self.dilation, self.groups, self.base_width = widths[0], 1, 1, 64
        self.conv1 = nn.Conv2d(3, widths[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, widths[0], depths[0])
        self.layer2 = self._make_layer(block, widths[1], depths[1], stride=2)
        self.layer3 = self._make_layer(block, widths[2], depths[2], stride=2)
        self.layer4 = self._make_layer(block, widths[3], depths[3], stride=2)
        self.out_channels = [planes * block.expansion for planes in widths]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if stride_in_1x1 and isinstance(module, Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
        stages = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
        self.frozen = tuple(name for stage in stages[:frozen_stages] for name in stage)
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)

    def train(self, mode: bool = True) -> ScaledResNet:
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps C2 .. C5 (strides 4, 8, 16, 32) of images [B, 3, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class CoarsestLevels(LastLevelP6P7):
    """torchvision's P6 and P7 from P5 or C5, right also for maps one cell wide in bfloat16 on a CPU.

    There the weight gradient of oneDNN's convolution of stride 2 holds uninitialised memory (seen with torch 2.14.1). A
    column of zeros on the right changes nothing else: the convolution pads with zeros itself.

    Args:
        in_channels: channels of the map that P6 is made from.
        channels: channels of P6 and P7.
        from_c5: whether that map is C5.
    """

    def __init__(self, in_channels: int, channels: int, from_c5: bool):
        super().__init__(in_channels, channels)
        self.use_P5 = not from_c5

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Levels and names with P6 and P7 appended."""
        p6 = self.p6(_two_wide(p[-1] if self.use_P5 else c[-1]))
        p7 = self.p7(_two_wide(F.relu(p6)))
        return [*p, p6, p7], [*names, "p6", "p7"]


def _two_wide(level: Tensor) -> Tensor:
    return F.pad(level, (0, 1)) if level.shape[-1] == 1 else level


class Pyramid(FeaturePyramidNetwork):
    """torchvision's feature pyramid: P3 .. P7 (P6 from P5 or C5) or, two-stage, P2 .. P6 (P6 subsampled from P5).

    Args:
        in_channels: channels of C2 .. C5.
        channels: channels of every level.
        two_stage: which of the two pyramids.
        p6_source: "p5" or "c5", for P3 .. P7.
    """

    def __init__(self, in_channels: list[int], channels: int, two_stage: bool, p6_source: str = "p5"):
        from_c5 = p6_source == "c5"
        coarse = in_channels[-1] if from_c5 else channels
        extra = LastLevelMaxPool() if two_stage else CoarsestLevels(coarse, channels, from_c5)
        self.first = 0 if two_stage else 1
        super().__init__(in_channels[self.first :], channels, extra)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The L levels, finest first, from maps C2 .. C5."""
        named = OrderedDict((str(i), x) for i, x in enumerate(maps[self.first :]))
        return list(super().forward(named).values())


def build_backbone_and_neck(config: DetectorConfig) -> tuple[ScaledResNet, Pyramid]:
    """Backbone and neck that `config` asks for, with torchvision's random weights."""
    backbone = ScaledResNet(
        config.backbone, config.width, config.norm, config.frozen_stages, stride_in_1x1=config.stride_in_1x1
    )
    return backbone, Pyramid(backbone.out_channels, config.channels, config.two_stage, config.p6_source)
