"""What makes the training step fast changes rounding alone: fused optimisers, the teacher's form for inference."""

import copy

import pytest
import torch
from detector_cases import rectangles, small_config
from torch import nn

from benchmarks.dispatch_ledger import count
from fastkd.detectors import build_detector
from fastkd.training.config import OptimizerConfig
from fastkd.training.optimizers import NamedOptimizer
from fastkd.training.step import FrozenTeacher


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fused_optimisers_take_torchs_steps(kind, layout):
    ours = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 3), nn.GroupNorm(2, 8)).to(memory_format=layout)
    theirs = copy.deepcopy(ours)
    config = OptimizerConfig(kind=kind, learning_rate=0.1, weight_decay=0.1, decay_norm_and_bias=True)
    mine = NamedOptimizer("student", config, dict(ours.named_parameters()))
    if kind == "sgd":
        plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=False)
    else:
        plain = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.1, fused=False)
    x = torch.randn(2, 4, 8, 8)
    for step in range(4):
        for module in (ours, theirs):
            module[0].requires_grad_(step >= 2)  # it joins later, as a backbone does that was frozen at first
            module(x).square().mean().backward()
        mine.step()
        plain.step()
        plain.zero_grad()
    for one, other, start in zip(ours.parameters(), theirs.parameters(), ours.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert one.grad is None and start.abs().max() > 0


def test_a_fused_step_is_a_few_operators():
    module = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    optimizer = NamedOptimizer("method", OptimizerConfig(kind="adamw", clip_norm=1.0), dict(module.named_parameters()))
    for _ in range(2):  # the first makes the states
        module(torch.randn(2, 3)).sum().backward()
        counts = count(optimizer.step)
    assert counts.by_op["aten::_fused_adamw_"] == 2 and counts.ops - counts.views < 15


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_frozen_teacher_in_its_form_for_inference(dtype):
    detector = build_detector(small_config("retinanet", norm="frozen_bn"))
    images = rectangles([1, 2]).images
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
        expected = detector.eval().features(images)
    before = count(lambda: detector.features(images))
    teacher = FrozenTeacher(detector, dtype)
    for one, other in zip(teacher.pyramid(images), expected, strict=True):
        assert one.dtype == other.dtype == (dtype or torch.float32) and not one.requires_grad
        rounding = (1e-4 if dtype is None else 5e-2) * float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=rounding)
    after = count(lambda: teacher.pyramid(images))
    assert after.by_op.get("aten::rsqrt", 0) == 0 < before.by_op["aten::rsqrt"]
    casts = after.by_op.get("aten::_to_copy", 0)
    assert casts <= 2  # the images, and no weight
