"""The modulated deformable convolution (DCNv2) of ResNets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import DeformConv2d, deform_conv2d

from fastkd.ops._support.coverage import full_precision


class ModulatedDeformConv(DeformConv2d):
    """A 3x3 convolution whose sampling offsets and weights are predicted by another 3x3 convolution of its input.

    The predicting convolution is initialised to zero: no offsets, and a weight of sigmoid(0) = 0.5 for every sample.
    The parameter `weight` has the name and shape of a plain convolution's.

    Args:
        like: the convolution to replace; its weights are reused.
    Source: Deformable ConvNets v2 (Zhu et al., 2019), with torchvision.ops.deform_conv2d.
    """

    def __init__(self, like: nn.Conv2d):
        geometry: dict[str, Any] = {"stride": like.stride, "padding": like.padding, "dilation": like.dilation}
        kernel = like.kernel_size[0], like.kernel_size[1]
        super().__init__(
            like.in_channels, like.out_channels, kernel, bias=like.bias is not None, groups=like.groups, **geometry
        )
        self.weight, self.bias = like.weight, like.bias
        self.taps = kernel[0] * kernel[1]
        self.offset = nn.Conv2d(like.in_channels, 3 * self.taps, kernel, **geometry)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C', H', W'] of the same type; computed in float32 also under autocast."""
        offset, mask = self.offset(maps).split([2 * self.taps, self.taps], dim=1)
        with full_precision(maps):
            result = deform_conv2d(
                maps.float(),
                offset.float(),
                self.weight,
                self.bias,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                mask=mask.float().sigmoid(),
            )
        return result.to(maps.dtype)


def make_deformable(stage: Iterable[Bottleneck]) -> None:
    """Replace the 3x3 convolution of every bottleneck of a stage."""
    for block in stage:
        block.conv2 = ModulatedDeformConv(block.conv2)
