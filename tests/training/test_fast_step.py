"""Optimisations of the training step change only rounding: fused optimisers, the teacher's inference form."""

import copy

import pytest
import torch
from detector_cases import KINDS, rectangles, small_config
from torch import nn

from benchmarks.step.dispatch_ledger import count
from fastkd.detectors import Detector, build_detector
from fastkd.distillers import LGD
from fastkd.training.config import OptimizerConfig
from fastkd.training.optimizers import NamedOptimizer
from fastkd.training.schedule import Phase
from fastkd.training.step import FrozenTeacher, StepModule, sum_losses


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


@pytest.mark.sampled
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "condinst_gn"])
def test_losses_of_two_pyramids_are_those_of_each(kind, ignored):
    changes = {"head_norm": "gn"} if kind == "condinst_gn" else {}
    detector, batch = build_detector(small_config(kind.removesuffix("_gn"), **changes)), rectangles([3, 0, 1])
    if ignored:
        batch.ignore_boxes, batch.ignore_index = torch.tensor([[0.0, 0.0, 40.0, 40.0]]), torch.tensor([1])
    pyramids = []
    for _ in range(2):
        with torch.no_grad():
            pyramid = detector.features(batch.images + torch.randn(()))
        pyramids.append([level.requires_grad_() for level in pyramid])
    calls = []
    first_stage = detector.head.rpn if "rcnn" in kind else detector.head
    handle = first_stage.register_forward_hook(lambda *_: calls.append(1))
    together = detector.losses(pyramids, batch)
    assert len(calls) == (2 if kind == "condinst" else 1)  # whose mask branch has batch statistics
    handle.remove()
    apart = [detector.loss(pyramid, batch) for pyramid in pyramids]
    assert [list(losses) for losses in together] == [list(losses) for losses in apart]
    assert all(together[0][name] != together[1][name] for name in together[0])
    wanted = [*pyramids[0], *pyramids[1], *detector.head.parameters()]
    totals = [sum(losses[0].values()) + 3 * sum(losses[1].values()) for losses in (together, apart)]
    torch.testing.assert_close(totals[0], totals[1])
    gradients = (torch.autograd.grad(total, wanted, allow_unused=True) for total in totals)
    for one, other in zip(*gradients, strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(float(other.abs().max()), 1e-6))


def test_a_detector_may_write_the_loss_of_one_pyramid_alone():
    class Alone(Detector):
        def loss(self, pyramid, batch):
            return {"sum": sum(level.sum() for level in pyramid)}

    class Neither(Detector):
        pass

    ours = build_detector(small_config("retinanet"))
    alone, neither = (kind(ours.config, ours.backbone, ours.neck, ours.head) for kind in (Alone, Neither))
    batch, levels = rectangles([1]), [torch.ones(1, 2, 3, 4)]
    assert alone.losses([levels, [2 * level for level in levels]], batch) == [{"sum": 24}, {"sum": 48}]
    for call in (lambda: neither.loss(levels, batch), lambda: neither.losses([levels], batch)):
        with pytest.raises(NotImplementedError, match="Neither: loss must be written"):
            call()


def test_lgd_calls_the_head_once():
    detector, batch = build_detector(small_config("retinanet")), rectangles([3, 1])
    module = StepModule(detector, LGD(3, 32, heads=4, instructive_weight=0.5))
    calls = []
    detector.head.register_forward_hook(lambda *_: calls.append(1))
    losses = module(batch, Phase())
    assert len(calls) == 1
    pyramid = detector.features(batch.images)
    expected = {**detector.loss(pyramid, batch), **module.distill(pyramid, batch, Phase())}
    assert list(losses) == list(expected) and "instructive_box_regression" in losses
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        (None, None),
        ("lgd", torch.bfloat16),
        pytest.param(None, torch.bfloat16, marks=pytest.mark.long),
        pytest.param("lgd", None, marks=pytest.mark.long),
    ],
    ids=["student, float32", "lgd, bfloat16", "student, bfloat16", "lgd, float32"],
)
def test_recomputing_gives_the_same_gradients_with_less_memory(method, dtype):
    batch, found = rectangles([3, 1], size=(128, 128)), []
    for recompute in (False, True):
        torch.manual_seed(0)
        detector = build_detector(small_config("retinanet", backbone="resnet50", norm="frozen_bn"))
        if recompute:
            detector.backbone.recompute()
        module = StepModule(detector, LGD(3, 32, heads=4, recompute=recompute) if method else None, dtype=dtype).train()
        for _ in range(2):
            module.zero_grad()
            counts = count(lambda module=module: sum_losses(module(batch, Phase())).backward())
        found.append((counts, {name: p.grad for name, p in module.named_parameters()}))
    (kept, ours), (again, theirs) = found
    assert again.peak < 0.97 * kept.peak and again.flops > kept.flops
    for name, gradient in ours.items():
        assert torch.equal(gradient, theirs[name]), name


def test_who_cannot_recompute_says_so():
    for changes, message in (
        ({"norm": "bn"}, "norm must be"),
        ({"backbone": "mobilenet_v2"}, "backbone must be a ResNet"),
    ):
        with pytest.raises(ValueError, match=f"recompute: {message}"):
            build_detector(small_config("retinanet", **changes)).backbone.recompute()
