"""torchvision's ResNets of any width, the feature pyramid, and the backbone of a configuration."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import ResNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from fastkd.detectors.backbones.base import NORM_LAYERS, Backbone
from fastkd.detectors.backbones.deformable import make_deformable
from fastkd.detectors.backbones.mobilenet import MobileNet
from fastkd.detectors.backbones.swin import SwinTiny
from fastkd.detectors.backbones.timm import TimmBackbone
from fastkd.detectors.common.folding import FoldingBasicBlock, FoldingBottleneck, conv_norm
from fastkd.detectors.config import TIMM, DetectorConfig

_BLOCKS: dict[
    str, tuple[Any, tuple[int, ...], int, int]
] = {  # block, its number in each stage, groups, width of a group
    "resnet18": (FoldingBasicBlock, (2, 2, 2, 2), 1, 64),
    "resnet34": (FoldingBasicBlock, (3, 4, 6, 3), 1, 64),
    "resnet50": (FoldingBottleneck, (3, 4, 6, 3), 1, 64),
    "resnet101": (FoldingBottleneck, (3, 4, 23, 3), 1, 64),
    "resnext101_32x8d": (FoldingBottleneck, (3, 4, 23, 3), 32, 8),
}


class ScaledResNet(Backbone, ResNet):
    """A torchvision ResNet without its classifier, all widths scaled; state-dict keys are torchvision's.

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101" or "resnext101_32x8d".
        width: factor on 64, 128, 256, 512; results are rounded to multiples of 8, at least 16 (the
            weight gradient of oneDNN's 1x1 convolution of stride 2 from 8 channels crashes the process, torch 2.14.1).
        norm: "frozen_bn", "bn" or "gn".
        frozen_stages: how many of (stem, layer1 .. layer4) are frozen, with the statistics of their BatchNorms.
        deformable: use modulated deformable 3x3 convolutions in layer2 .. layer4.
        stride_in_1x1: bottlenecks have their stride in the first convolution instead of the second.
    """

    fresh = ("conv2.offset.weight", "conv2.offset.bias")
    _make_layer: Callable[..., nn.Sequential]  # untyped in torchvision

    def __init__(
        self,
        name: str,
        width: float = 1.0,
        norm: str = "frozen_bn",
        frozen_stages: int = 0,
        *,
        deformable: bool = False,
        stride_in_1x1: bool = False,
    ):
        nn.Module.__init__(self)  # ResNet's constructor fixes the widths; its body is repeated here
        block, depths, self.groups, self.base_width = _BLOCKS[name]
        widths = [max(16, 8 * round(base * width / 8)) for base in (64, 128, 256, 512)]
        self._norm_layer = NORM_LAYERS[norm]
        self.inplanes, self.dilation = widths[0], 1
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
            if stride_in_1x1 and isinstance(module, FoldingBottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
        for layer in (self.layer2, self.layer3, self.layer4) if deformable else ():
            make_deformable(layer)
        self.freeze((("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)), frozen_stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps C2 .. C5 (strides 4, 8, 16, 32) of images [B, 3, H, W]."""
        x = self.maxpool(self.relu(conv_norm(self.conv1, self.bn1, images)))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                again = self.recomputes and torch.is_grad_enabled()
                x = checkpoint(block, x, use_reentrant=False) if again else block(x)
            maps.append(x)
        return maps

    def recompute(self) -> None:
        if any(isinstance(module, nn.BatchNorm2d) for module in self.modules()):
            raise ValueError('recompute: norm must be "frozen_bn" or "gn", got "bn", which would count a batch twice')
        self.recomputes = True


class CoarsestLevels(LastLevelP6P7):
    """torchvision's P6 and P7 from P5 or C5, correct also for narrow maps in bfloat16 on a CPU.

    oneDNN's convolution of stride 2 reads uninitialised memory for maps that are one cell wide (weight gradient) or at
    most two cells wide (output) in torch 2.14.1. Such maps are padded with zeros on the right to a width of three, and
    the additional output columns are cut off; the others do not change, as the convolution pads with zeros itself.

    Args:
        in_channels: channels of the input of P6.
        channels: channels of P6 and P7.
        from_c5: whether that input is C5.
    """

    def __init__(self, in_channels: int, channels: int, from_c5: bool):
        super().__init__(in_channels, channels)
        self.use_P5 = not from_c5

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Levels and names with P6 and P7 appended."""
        p6 = _halved(self.p6, p[-1] if self.use_P5 else c[-1])
        p7 = _halved(self.p7, F.relu(p6))
        return [*p, p6, p7], [*names, "p6", "p7"]


def _halved(convolution: nn.Conv2d, level: Tensor) -> Tensor:
    """The next level; only bfloat16 depends on the width, so that an exported graph takes any width."""
    low = convolution.weight.dtype == torch.bfloat16 or torch.is_autocast_enabled(level.device.type)
    if not low or level.shape[-1] > 2:
        return convolution(level)
    return convolution(F.pad(level, (0, 3 - level.shape[-1])))[..., :1]


class Pyramid(FeaturePyramidNetwork):
    """torchvision's feature pyramid: P3 .. P7 (P6 from P5 or C5) or P2 .. P6 (P6 subsampled from P5).

    Args:
        in_channels: channels of C2 .. C5.
        channels: channels of every level.
        fine: whether the pyramid starts at P2.
        p6_source: "p5" or "c5", for P3 .. P7.
    """

    def __init__(self, in_channels: list[int], channels: int, fine: bool, p6_source: str = "p5"):
        from_c5 = p6_source == "c5"
        coarse = in_channels[-1] if from_c5 else channels
        extra = LastLevelMaxPool() if fine else CoarsestLevels(coarse, channels, from_c5)
        self.first = 0 if fine else 1
        super().__init__(in_channels[self.first :], channels, extra)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The L levels, finest first, from maps C2 .. C5."""
        named = OrderedDict((str(i), x) for i, x in enumerate(maps[self.first :]))
        return list(super().forward(named).values())


def build_backbone(config: DetectorConfig) -> Backbone:
    """The backbone of `config`, with random weights."""
    if config.backbone.startswith(TIMM):
        return TimmBackbone(config.backbone.removeprefix(TIMM))
    if config.backbone == "swin_t":
        return SwinTiny(config.width, config.frozen_stages, first=0 if config.fine else 1)
    if config.backbone == "mobilenet_v2":
        return MobileNet(config.width, config.norm, config.frozen_stages)
    settings = (config.backbone, config.width, config.norm, config.frozen_stages)
    return ScaledResNet(*settings, deformable=config.deformable, stride_in_1x1=config.stride_in_1x1)


def build_backbone_and_neck(config: DetectorConfig) -> tuple[Backbone, Pyramid]:
    """Backbone and neck of `config`, with random weights."""
    backbone = build_backbone(config)
    return backbone, Pyramid(backbone.out_channels, config.channels, config.fine, config.p6_source)
