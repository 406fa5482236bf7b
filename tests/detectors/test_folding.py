"""Frozen norms folded into convolutions: the same maps and gradients."""

import copy

import pytest
import torch
from detector_cases import rectangles, small_config
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.step.dispatch_ledger import count
from fastkd.detectors import build_detector
from fastkd.detectors.common.folding import FoldingBasicBlock, FoldingBottleneck, conv_norm, fold_norms


def stir(module):
    """Set statistics that differ from the identity."""
    for norm in module.modules():
        if isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            for name in ("weight", "running_var"):
                nn.init.uniform_(getattr(norm, name), 0.5, 2.0)
            for name in ("bias", "running_mean"):
                nn.init.normal_(getattr(norm, name))
    return module


@pytest.mark.parametrize(
    "pair", [(FoldingBasicBlock, BasicBlock, 16), (FoldingBottleneck, Bottleneck, 4)], ids=["basic", "bottleneck"]
)
@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_blocks_compute_what_torchvisions_do(pair, norm):
    folding, original, width = pair
    down = nn.Sequential(nn.Conv2d(16, 16, 1, stride=2, bias=False), norm(16))
    one = stir(folding(16, width, stride=2, downsample=down, norm_layer=norm)).double()
    other = original(16, width, stride=2, downsample=copy.deepcopy(down), norm_layer=norm).double()
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 16, 9, 7, dtype=torch.float64, requires_grad=True)
    for ours, theirs in zip(*(results(block, x) for block in (one, other)), strict=True):
        torch.testing.assert_close(ours, theirs)


def results(block, x):
    out = block(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *block.parameters()])]


def test_a_frozen_norm_costs_no_pass_over_the_map():
    conv, norm, x = nn.Conv2d(4, 4, 3, padding=1, bias=False), stir(FrozenBatchNorm2d(4)), torch.randn(1, 4, 64, 64)
    folded, apart = count(lambda: conv_norm(conv, norm, x)), count(lambda: norm(conv(x)))
    assert apart.bytes - folded.bytes > 3.9 * x.numel() * x.element_size()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv_norm(conv, norm, x).dtype == torch.bfloat16 and norm(conv(x)).dtype == torch.float32


@pytest.mark.parametrize("changes", [{"norm": "frozen_bn"}, {"norm": "bn"}, {"norm": "gn"}], ids=str)
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_fold_norms_changes_rounding_alone(changes, backbone):
    plain = stir(build_detector(small_config("retinanet", backbone=backbone, **changes))).eval()
    folded = copy.deepcopy(plain)
    images = rectangles([1]).images
    assert fold_norms(folded) == (0 if changes["norm"] == "gn" else {"resnet18": 20, "resnet50": 53}[backbone])
    for one, other in zip(folded.features(images), plain.features(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))
    with pytest.raises(ValueError, match=r"fold_norms: module must be in eval mode.*call \.eval\(\)"):
        fold_norms(plain.train())


def test_fold_norms_of_a_deformable_backbone():
    plain = stir(
        build_detector(small_config("retinanet", backbone="resnet50", norm="frozen_bn", deformable=True))
    ).eval()
    images, folded = rectangles([1]).images, copy.deepcopy(plain)
    fold_norms(folded)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in folded.modules())
    for one, other in zip(folded.features(images), plain.features(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.detach().abs().max()))


def test_relu_is_not_folded_away():
    block = stir(FoldingBasicBlock(4, 4, norm_layer=FrozenBatchNorm2d))
    x = torch.randn(1, 4, 5, 5)
    hidden = F.relu(block.bn1(block.conv1(x)))
    expected = F.relu(block.bn2(block.conv2(hidden)) + x)
    torch.testing.assert_close(block(x), expected)
