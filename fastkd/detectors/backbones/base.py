"""The interface of backbones, frozen stages, and normalisation layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class Backbone(nn.Module):
    """Images [B, 3, H, W] to maps C2 .. C5 of strides 4, 8, 16, 32.

    Attributes:
        out_channels: channels of the four maps.
        frozen: names of the submodules that never train.
        fresh: name suffixes of parameters that classifier weight files do not contain.
        recomputes: whether `recompute` was called.
    """

    out_channels: list[int]
    frozen: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    recomputes: bool = False

    def recompute(self) -> None:
        """Enable activation recomputation: the backward pass computes the activations of each block again.

        Raises: ValueError if the backbone does not support it, or its batch norms would count a batch twice.
        """
        raise ValueError(f"recompute: backbone must be a ResNet, got {type(self).__name__}; leave recompute off")

    def freeze(self, stages: Sequence[Sequence[str]], count: int) -> None:
        """Freeze the first `count` stages; a stage is given by the names of its submodules."""
        self.frozen = tuple(name for stage in stages[:count] for name in stage)
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def own_name(self, name: str, known: Mapping[str, Tensor]) -> str:
        """Our name of the tensor that a weight file calls `name`; `known` is the state dict."""
        return name


def frozen_batch_norm(channels: int) -> nn.Module:
    """BatchNorm with fixed statistics and affine."""
    return FrozenBatchNorm2d(channels, eps=1e-5)  # as BatchNorm2d in eval mode; torchvision's default is 0


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or fewer so that each has at least two channels (the coarsest map may have one cell)."""
    return nn.GroupNorm(math.gcd(32, max(channels // 2, 1)), channels)


NORM_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "frozen_bn": frozen_batch_norm,
    "bn": nn.BatchNorm2d,
    "gn": group_norm,
}
