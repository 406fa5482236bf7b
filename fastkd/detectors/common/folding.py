"""Normalisation with fixed statistics, folded into the convolution before it: norm(W * x) = (s W) * x + t."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import DeformConv2d, FrozenBatchNorm2d


def scale_and_shift(norm: FrozenBatchNorm2d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """s and t of norm(x) = s x + t with the running statistics: two tensors [C]."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale, torch.addcmul(norm.bias, mean, scale, value=-1)


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)); for a frozen norm, computed as one convolution with the scaled weight.

    This saves two passes over the map and, under autocast, the casts to float32 and back. The weight gradient equals
    that of the two modules up to rounding.
    """
    if not isinstance(norm, FrozenBatchNorm2d) or type(conv) is not nn.Conv2d or conv.bias is not None:
        return norm(conv(x))
    scale, shift = scale_and_shift(norm)
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


class FoldingBasicBlock(BasicBlock):
    """torchvision's block; its frozen norms are part of the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else conv_norm(self.downsample[0], self.downsample[1], x)
        out = self.relu(conv_norm(self.conv1, self.bn1, x))
        out = conv_norm(self.conv2, self.bn2, out)
        out += identity
        return self.relu(out)


class FoldingBottleneck(Bottleneck):
    """torchvision's block; its frozen norms are part of the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else conv_norm(self.downsample[0], self.downsample[1], x)
        out = self.relu(conv_norm(self.conv1, self.bn1, x))
        out = self.relu(conv_norm(self.conv2, self.bn2, out))
        out = conv_norm(self.conv3, self.bn3, out)
        out += identity
        return self.relu(out)


@torch.no_grad()
def fold_norms(module: nn.Module) -> int:
    """Permanently folds the norms of all ResNet blocks of a frozen module into its convolutions.

    A norm is folded where its statistics are fixed: FrozenBatchNorm2d, or BatchNorm2d in eval mode. It is replaced
    by an identity, and the convolution gets a bias.

    Args:
        module: in eval mode; modified in place, including its state-dict keys.
    Returns: the number of folded norms.
    Raises: ValueError if the module is in training mode.
    """
    if module.training:
        raise ValueError("fold_norms: module must be in eval mode, got one in training mode; call .eval()")
    folded = 0
    for part in list(module.modules()):
        names = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")] if hasattr(part, "bn1") else []
        downsample = getattr(part, "downsample", None)
        if isinstance(downsample, nn.Sequential):
            downsample[1], done = _fold(downsample[0], downsample[1])
            folded += done
        for conv, norm in names:
            if hasattr(part, norm):
                identity, done = _fold(getattr(part, conv), getattr(part, norm))
                setattr(part, norm, identity)
                folded += done
    return folded


def _fold(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, bool]:
    fixed = isinstance(norm, FrozenBatchNorm2d) or (isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats)
    if not fixed or not isinstance(conv, (nn.Conv2d, DeformConv2d)) or conv.bias is not None:
        return norm, False
    scale, shift = scale_and_shift(norm)
    conv.weight.mul_(scale[:, None, None, None])
    conv.bias = nn.Parameter(shift, requires_grad=False)
    return nn.Identity(), True
