"""Failures of a method, values that are not finite, and what an attachment leaves behind."""

import contextlib
import copy
import gc
import re
import weakref

import pytest
import torch
from torch import nn
from torchvision_cases import CLASSES, batch, detector

from fastkd.integrations import Distillation, HostStep, Teacher, make_batch
from fastkd.integrations.gradients import FiniteGradient, GradientRecord
from fastkd.integrations.torchvision import attach
from fastkd.integrations.traces import preserved_randomness, unrecorded_statistics

METHODS = pytest.mark.parametrize("method", ["icd", "lgd", "scorel2"])


def teacher():
    return detector("retinanet", channels=64, width=24, seed=1).eval()


def attached(method="icd", **options):
    model = detector("retinanet").train()
    options = {"num_classes": CLASSES, "detach_steps": 0} | options
    return model, attach(model, method, teacher=None if method == "lgd" else teacher(), **options)


def losses_of(model, seed=0):
    return model(*batch("retinanet", seed=seed))


def total(model, seed=0):
    return sum(losses_of(model, seed).values())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def spoil(kd):
    """One of the method's parameters is NaN, as after a failed update."""
    next(iter(kd.distillation.network.method.parameters())).data.fill_(float("nan"))


@METHODS
def test_losses_that_are_not_finite_are_a_failure(method):
    model, kd = attached(method)
    losses_of(model)
    spoil(kd)
    with pytest.warns(UserWarning, match=r"(?s)this batch trains alone.*losses must be finite"):
        losses = losses_of(model, 1)
    assert set(losses) == {"classification", "bbox_regression"} and kd.state.failures == 1


@METHODS
def test_losses_that_are_not_finite_count_zero_where_they_are_not_checked(method, monkeypatch):
    """As on a GPU after the first batches: total and gradients, also the head's, are those of the host alone."""
    model, kd = attached(method)
    losses_of(model)
    spoil(kd)
    monkeypatch.setattr(kd, "check_values", lambda device: False)
    plain = detector("retinanet").train()
    plain.load_state_dict(model.state_dict())
    losses, expected = losses_of(model, 1), losses_of(plain, 1)
    own = set(losses) - set(expected)
    assert own and not any(losses[name].detach().any() for name in own)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    wanted = gradients(plain)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)
    kd.step()
    assert "not finite and counted as zero: 1 of 1" in kd.report()


@pytest.mark.parametrize("weight", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite(weight):
    with pytest.raises(ValueError, match="weight must be finite, got"):
        attached(weight=weight)


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


@pytest.mark.parametrize(("dtype", "factor", "seen"), [
    (torch.float16, 65536.0, True), (torch.float16, 64.0, False), (torch.bfloat16, 65536.0, False),
])  # fmt: skip
def test_an_overflow_reaches_a_grad_scaler_and_no_one_else(dtype, factor, seen):
    record, level = GradientRecord(), torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", dtype):
        loss = _Overflow.apply(FiniteGradient.apply(level, record)).sum()
    (factor * record.watch({"loss": loss})["loss"]).backward()
    assert bool(level.grad.isfinite().all()) != seen
    record.next_step()
    assert int(record.zeroed_steps) == (not seen)


def test_a_grad_scaler_lowers_its_scale_for_the_method():
    """The method overflows in the first two steps; the host's steps are skipped and its weights stay finite."""
    model, kd = attached("pkd")
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    watch, limit = GradientRecord.watch, 256.0
    scales = []

    def overflowing(record, losses):
        scaled = scaler.get_scale() > limit
        return watch(record, {name: _Overflow.apply(loss) if scaled else loss for name, loss in losses.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientRecord, "watch", overflowing)
        for step in range(4):
            with torch.autocast("cpu", torch.float16):
                loss = total(model, step)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            kd.step()
            scales.append(scaler.get_scale())
    assert scales == [512.0, 256.0, 256.0, 256.0]
    assert all(p.isfinite().all() for p in [*model.parameters(), *kd.distillation.network.parameters()])


def test_gradients_that_are_often_not_finite_are_reported():
    model, kd = attached()
    for step in range(2):
        total(model, step).backward()
        if step:
            next(iter(kd.distillation.network.parameters())).grad.fill_(float("inf"))
        kd.step()
    assert "not finite and counted as zero: 1 of 2" in kd.report() and "use bfloat16" in kd.report()


def test_parameters_without_a_gradient_are_reported():
    model, kd = attached()
    total(model).backward()
    kd.step()
    assert "no gradient reached" not in kd.report()
    total(model, 1).backward()
    kd.distillation.network.method.auxiliary[0].weight.grad = None
    kd.step()
    assert "no gradient reached these parameters" in kd.report() and ": method.auxiliary.0.weight" in kd.report()


def test_model_and_attachment_are_freed():
    model, kd = attached()
    total(model).backward()
    kd.step()
    found = [weakref.ref(model), weakref.ref(kd), weakref.ref(kd.teacher.module)]
    del model, kd
    gc.collect()
    assert [reference() for reference in found] == [None] * 3


def test_a_failure_keeps_no_tensors_of_its_batch():
    model, kd = attached()
    losses_of(model)
    held = []

    def broken(inputs, features):
        held.append(weakref.ref(features["0"]))
        raise RuntimeError("broken")

    kd._host_step = broken
    gc.collect()
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="this batch trains alone"):
            losses_of(model, 1)
        assert held[0]() is None
    finally:
        gc.enable()


def test_building_seeds_only_the_cpu(monkeypatch):
    """torch.manual_seed would also seed every GPU of the host."""
    model, kd = attached()
    plain, start = detector("retinanet").train(), torch.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeded all devices"))
    losses_of(plain)
    expected = torch.get_rng_state()
    torch.set_rng_state(start)
    losses_of(model)
    assert kd.state.computed == 1 and torch.equal(torch.get_rng_state(), expected)


def test_a_distillation_of_its_own_preserves_the_hosts_random_numbers():
    kd = Distillation("lgd", num_classes=2, detach_steps=0)
    images, levels = torch.rand(1, 3, 32, 32), [torch.rand(1, 8, 4, 4, requires_grad=True)]
    made = make_batch(images, [(32, 32)], [torch.tensor([[2.0, 2, 20, 20]])], [torch.tensor([1])], num_classes=2)
    state = torch.get_rng_state()
    kd(HostStep(made, levels, rerun=lambda others: {"loss": (others[0] * torch.rand(())).sum()}))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("device", ["cuda:1", "xpu:0", "mps"])
def test_randomness_of_other_devices(device, monkeypatch):
    class Module:
        states = {"cuda:1": 1, "xpu:0": 1, "mps": 1}  # noqa: RUF012

        def get_rng_state(self, device="mps"):
            return self.states[str(device)]

        def set_rng_state(self, state, device="mps"):
            self.states[str(device)] = state

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module())
    with preserved_randomness(torch.device(device)):
        Module.states[device] = 7
    assert Module.states[device] == 1


def test_boxes_outside_warn_once_for_each_attachment():
    images, targets = batch("retinanet")
    for _ in range(2):
        model, _ = attached("pkd")
        with pytest.warns(UserWarning, match="reach out of their image") as caught:
            for step in range(3):
                targets[0]["boxes"][0] = torch.tensor([-30.0 - step, 10, 500, 60])
                model(images, targets)
        assert len(caught) == 1


def test_labels_and_boxes_that_are_not_checked_are_harmless():
    labels, images = torch.tensor([-3, 900, 1]), torch.zeros(1, 3, 32, 32)
    boxes = torch.tensor([[torch.nan, 1, 5, torch.inf], [1, 1, 9, 9], [2, 2, 8, 8]])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\) for 4 classes, got -3"):
        make_batch(images, [(32, 32)], [boxes], [labels], num_classes=4)
    made = make_batch(images, [(32, 32)], [boxes], [labels], num_classes=4, check=False)
    assert made.labels.tolist() == [0, 3, 1] and made.boxes.isfinite().all()


class HandWrittenNorm(nn.BatchNorm2d):
    """As detectron2's NaiveSyncBatchNorm: its forward pass writes the statistics."""

    def forward(self, x):
        mean = x.mean((0, 2, 3))
        self.running_mean += self.momentum * (mean.detach() - self.running_mean)
        self.num_batches_tracked = self.num_batches_tracked + 1
        return (x - mean[:, None, None]) * self.weight[:, None, None]


def test_a_second_pass_leaves_no_trace_in_a_hand_written_norm():
    model = detector("retinanet").train()
    model.head.classification_head.conv[0].append(HandWrittenNorm(32))
    twin = copy.deepcopy(model)
    attach(model, "lgd", num_classes=CLASSES, detach_steps=0)
    total(model).backward()
    losses_of(twin)
    for (name, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


def test_buffers_that_autograd_saved_survive_a_second_pass():
    norm = HandWrittenNorm(2)
    norm.register_buffer("scale", torch.full((1,), 3.0))
    x = torch.rand(2, 2, 3, 3, requires_grad=True)
    first = (norm(x) * norm.scale).sum()
    before, identity = {name: value.clone() for name, value in norm.named_buffers()}, norm.running_mean
    with contextlib.suppress(ZeroDivisionError), unrecorded_statistics(norm):
        norm(x)
        norm.scale.mul_(2)
        raise ZeroDivisionError
    first.backward()
    assert norm.running_mean is identity
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())


@pytest.mark.parametrize("part", [lambda model: model, lambda model: Teacher(model.backbone)], ids=["model", "part"])
def test_a_teacher_that_is_the_student(part):
    model = detector("retinanet").eval()
    with pytest.raises(ValueError, match=re.escape("teacher must be another model than the student")):
        attach(model, "icd", teacher=part(model), num_classes=CLASSES)
    assert all(p.requires_grad for p in model.parameters())


def test_detaching_restores_the_teacher():
    taught, given = detector("retinanet").train(), teacher()
    given.backbone.fpn.train()
    given.head.requires_grad_(False)
    modes = [part.training for part in given.modules()]
    wanted = [p.requires_grad for p in given.parameters()]
    with pytest.warns(UserWarning, match="the teacher was in train mode"):
        kd = attach(taught, "icd", teacher=given, num_classes=CLASSES)
    assert not any([p.requires_grad for p in given.parameters()] + [part.training for part in given.modules()])
    losses_of(taught)
    kd.detach()
    assert [part.training for part in given.modules()] == modes
    assert [p.requires_grad for p in given.parameters()] == wanted
