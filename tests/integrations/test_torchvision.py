"""Distillation inside torchvision's own training loop, on the real package."""

import contextlib
import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torchvision_cases import CLASSES, NAMES, batch, detector

from fastkd.distillers import ICD, LGD
from fastkd.integrations.methods import icd_heads
from fastkd.integrations.report import Probe
from fastkd.integrations.torchvision import attach, priors_of_loader
from fastkd.types import ClassPriors

METHODS = {
    "icd": "icd_distill", "lgd": "lgd_distill", "fgfi": "fgfi_imitation", "pkd": "pkd_distill", "cwd": "cwd_distill",
    "scorel2": "scorel2_distill",
}  # fmt: skip
CASES = [(name, method) for name in NAMES for method in ("icd", "lgd")]
CASES += [(name, "fgfi") for name in ("retinanet", "fcos", "faster-rcnn")]  # SSD has no anchors of one cell
CASES += [(name, method) for name in ("retinanet", "ssdlite") for method in ("pkd", "cwd")]
CASES += [(name, "scorel2") for name in NAMES]


def teacher_of(name, seed=1):
    return detector(name, channels=64, width=24, seed=seed).eval()


def attached(name, method="icd", **options):
    model = detector(name).train()
    options = {"num_classes": CLASSES, "detach_steps": 0} | options
    return model, attach(model, method, teacher=None if method == "lgd" else teacher_of(name), **options)


def loss_of(model, name, **options):
    losses = model(*batch(name, **options))
    return losses, sum(losses.values())


def hooks_of(model):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


@pytest.mark.parametrize(("name", "method"), CASES)
def test_losses_appear_and_reach_the_backbone(name, method):
    model, kd = attached(name, method)
    losses, _ = loss_of(model, name)
    plain = detector(name).train()
    torch.manual_seed(0)
    assert set(losses) > set(plain(*batch(name)))
    own = {key: value for key, value in losses.items() if key.startswith(f"{method}_")}
    assert METHODS[method] in own and all(value.isfinite() and value.dim() == 0 for value in own.values())
    own[METHODS[method]].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())
    kd.step()
    assert kd.state.steps == 1 and kd.state.attached and set(kd.state.losses) == set(own)


@pytest.mark.parametrize("name", NAMES)
def test_detach_restores_the_plain_model(name):
    """Outputs, state dict, batch statistics and random numbers are those of an unattached model."""
    model, plain = detector(name).train(), detector(name).train()
    kd = attach(model, "lgd", num_classes=CLASSES, detach_steps=0)
    torch.manual_seed(3)
    with torch.no_grad():
        expected = plain(*batch(name))
    torch.manual_seed(3)
    losses = model(*batch(name))
    assert any(key.startswith("lgd_") for key in losses)
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=0, atol=0)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().set_state(_state_after(plain, name))))
    kd.detach()
    assert hooks_of(model) == 0 and not kd.state.attached
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    images = batch(name)[0]
    for mine, theirs in zip(model.eval()(images), plain.eval()(images), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def _state_after(plain, name):
    """The random state after one training call of the plain model from seed 3, its statistics kept."""
    twin = copy.deepcopy(plain)
    torch.manual_seed(3)
    with torch.no_grad():
        twin(*batch(name))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with torch.no_grad():
        twin(*batch(name))
    return state


def test_no_distillation_in_eval_mode():
    model, kd = attached("retinanet")
    assert isinstance(model.eval()(batch("retinanet")[0]), list)
    assert kd.state.computed == 0


def test_the_host_never_finds_teacher_or_modules():
    model, kd = attached("retinanet")
    before = set(dict(model.named_modules())) | set(model.state_dict())
    loss_of(model, "retinanet")[1].backward()
    assert set(dict(model.named_modules())) | set(model.state_dict()) == before
    model.requires_grad_(True)
    assert not any(p.requires_grad for p in kd.teacher.module.parameters()) and not kd.teacher.module.training


def test_state_dict_loads_in_the_unmodified_model():
    model, _ = attached("faster-rcnn")
    loss_of(model, "faster-rcnn")[1].backward()
    detector("faster-rcnn").load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("method", ["icd", "lgd"])
def test_autocast_of_a_two_stage_detector(method):
    model, kd = attached("faster-rcnn", method)
    with torch.autocast("cpu", torch.bfloat16):
        losses, total = loss_of(model, "faster-rcnn")
    total.backward()
    kd.step()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.dtype == torch.float32 for p in kd.distillation.network.parameters())


def test_a_compiled_backbone():
    """Backend "eager" traces graphs without a C++ compiler."""
    expected, _ = loss_of(attached("retinanet")[0], "retinanet")
    model, _ = attached("retinanet")
    model.backbone.compile(backend="eager")
    losses, total = loss_of(model, "retinanet")
    total.backward()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_a_backbone_compiled_by_inductor():
    """Needs a C++ compiler: code generated for forward and backward pass."""
    expected, _ = loss_of(attached("retinanet")[0], "retinanet")
    model, _ = attached("retinanet")
    model.backbone.compile()
    losses, compiled = loss_of(model, "retinanet")
    assert set(losses) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-3, atol=1e-4)
    compiled.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())


def test_gradients_that_are_not_finite_are_skipped():
    model, kd = attached("retinanet")
    loss_of(model, "retinanet")[1].backward()
    before = [p.detach().clone() for p in kd.distillation.network.parameters()]
    for p in kd.distillation.network.parameters():
        p.grad = None if p.grad is None else torch.full_like(p.grad, float("inf"))
    kd.step()
    for p, old in zip(kd.distillation.network.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=1e-4, atol=1e-6)  # weight decay alone


def test_report_does_not_depend_on_the_hosts_factor():
    shares = []
    for factor in (1.0, 1024.0):
        model, kd = attached("retinanet", "pkd", detach_steps=0)
        (factor * loss_of(model, "retinanet")[1]).backward()
        shares.append(next(line for line in kd.report().splitlines() if line.startswith("pkd_distill")))
    assert shares[0] == shares[1]


def test_report_names_levels_that_the_detection_loss_hardly_uses():
    probe = Probe()
    probe.measured, probe.norms = 64, {"icd_distill": [torch.tensor(0.02), torch.tensor(0.03)]}
    probe.factors = {"icd_distill": torch.tensor(8.0)}
    assert "hardly uses level 1," in probe._extremes([1.0, 0.24])[0][1]
    assert probe._extremes([1.0, 0.5]) == []


def train(model, kd, steps, optimizer, name="retinanet"):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, name, seed=step)[1].backward()
        optimizer.step()
        kd.step()


def test_the_rate_follows_the_run():
    model, kd = attached("retinanet", total_steps=4, lr=0.1)
    train(model, kd, range(2), torch.optim.SGD(model.parameters(), 0.0))
    assert kd.distillation.optimizer.adamw.param_groups[0]["lr"] == pytest.approx(0.05)
    assert not kd.distillation._detached()


@pytest.mark.parametrize(("steps", "rate"), [(None, 1e-4), (90_000, 1e-4), (180_000, 1e-4), (22_500, 2e-4), (10, 1e-3)])
def test_shorter_runs_have_a_higher_rate(steps, rate):
    model, kd = attached("retinanet", total_steps=steps)
    loss_of(model, "retinanet")[1].backward()
    assert kd.distillation.optimizer.lr == pytest.approx(rate)


def test_detached_in_the_first_part_of_the_run():
    model, kd = attached("retinanet", detach_steps=1)
    losses, _ = loss_of(model, "retinanet")
    losses["icd_distill"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.backbone.parameters())
    kd.step()
    loss_of(model, "retinanet")[0]["icd_distill"].backward()
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())


def test_priors_from_batches_or_loader_or_given():
    model, kd = attached("faster-rcnn")
    data = [batch("faster-rcnn", seed=seed) for seed in (0, 1)]
    for images, targets in data:
        sum(model(images, targets).values())
    running = kd.distillation.running.priors()
    whole = priors_of_loader(data, CLASSES, 1)
    for mine, theirs in zip(dataclasses.astuple(running), dataclasses.astuple(whole), strict=True):
        torch.testing.assert_close(mine, theirs)
    labels = torch.cat([target["labels"] for _, targets in data for target in targets]) - 1
    torch.testing.assert_close(running.frequency, labels.bincount(minlength=CLASSES) / len(labels), check_dtype=False)
    torch.testing.assert_close(kd.distillation.network.method.prior_mean, whole.mean)
    for priors in (data, whole):
        model, kd = attached("faster-rcnn", priors=priors)
        loss_of(model, "faster-rcnn")
        assert kd.distillation.running is None
        torch.testing.assert_close(kd.distillation.network.method.prior_mean, whole.mean)


def test_images_without_boxes():
    for method in ("icd", "lgd"):
        model, kd = attached("retinanet", method)
        losses, total = loss_of(model, "retinanet", counts=(0, 0))
        total.backward()
        kd.step()
        assert all(value.isfinite() for value in losses.values())


def test_a_teacher_of_another_architecture_stride_and_normalisation():
    """A two-stage teacher of /4../64 and a dense student of /8../128: four levels match."""
    teacher = teacher_of("faster-rcnn")
    teacher.transform.image_mean, teacher.transform.image_std = [0.5] * 3, [0.5] * 3
    model = detector("retinanet").train()
    kd = attach(model, "icd", teacher=teacher, num_classes=CLASSES, detach_steps=0)
    loss_of(model, "retinanet")[1].backward()
    assert kd.distillation.network.spec.pairs == ((0, 1), (1, 2), (2, 3), (3, 4))
    assert "no partner in the teacher" in kd.report()
    images, targets = batch("retinanet")
    prepared = model.transform(images, targets)[0]
    own = teacher.transform(images)[0].tensors
    sizes = torch.tensor(prepared.image_sizes)
    from fastkd.integrations.teachers import renormalize

    found = renormalize(prepared.tensors, sizes, kd.normalization, kd.teacher.normalization)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


def test_a_teacher_with_large_features(tmp_path):
    """ICD by name scales them to a root mean square of 1, and a resumed run by the same factor."""
    teacher = teacher_of("retinanet")
    for block in (*teacher.backbone.fpn.layer_blocks, *teacher.backbone.fpn.extra_blocks.children()):
        for parameter in block.parameters():
            parameter.data *= 50
    model = detector("retinanet").train()
    kd = attach(model, "icd", teacher=teacher, num_classes=CLASSES)
    loss_of(model, "retinanet")
    levels = teacher.backbone(model.transform(*batch("retinanet"))[0].tensors).values()
    size = torch.cat([level.flatten() for level in levels]).square().mean().sqrt()
    scale = kd.distillation.teacher_scale
    assert size > 5 and kd.distillation.network.method.teacher_scale == scale == pytest.approx(
        1 / size.item(), rel=0.01
    )
    assert "in ICD's attention" in kd.report() and "saturates" not in kd.report()
    kd.save(tmp_path / "kd.pt")
    again = detector("retinanet").train()
    again_kd = attach(again, "icd", teacher=teacher, num_classes=CLASSES)
    again_kd.load(tmp_path / "kd.pt")
    loss_of(again, "retinanet", seed=5)
    assert again_kd.distillation.network.method.teacher_scale == scale

    priors = ClassPriors(torch.full((CLASSES,), 0.2), torch.full((CLASSES, 2), 0.2), torch.full((CLASSES, 2), 0.1))
    own = detector("retinanet").train()
    own_kd = attach(own, ICD(CLASSES, priors, 32, teacher_channels=64), teacher=teacher, num_classes=CLASSES)
    loss_of(own, "retinanet")
    assert own_kd.distillation.network.method.teacher_scale == 1 and "attention saturates" in own_kd.report()


@pytest.mark.parametrize(("channels", "heads"), [(256, 8), (64, 2), (16, 1), (80, 2), (104, 2)])
def test_heads_of_icd_have_about_32_channels(channels, heads):
    assert icd_heads(channels) == heads


def test_masks_of_mask_rcnn():
    model = detector("mask-rcnn").train()
    attach(model, LGD(CLASSES, 32, heads=2, use_masks=True, context=False), num_classes=CLASSES)
    losses, total = loss_of(model, "mask-rcnn")
    total.backward()
    assert losses["lgd_loss_mask"].isfinite() and losses["lgd_distill"] > 0


def test_the_report_of_losses_and_gradients():
    model, kd = attached("retinanet")
    assert "no batch has been distilled" in kd.report()
    loss_of(model, "retinanet")[1].backward()
    text = kd.report()
    assert "levels matched (student, teacher): [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]" in text
    assert "icd_distill = " in text and "kd.step() was never called" in text
    assert "the teacher finds 0 of the 4 objects" in text and "trained on these classes" in text
    norms = [float(norm) for norm in kd.distillation.probe.norms["icd_distill"]]
    assert all(norm > 0 for norm in norms) and not any(map(float, kd.distillation.probe.norms["icd_localisation"]))
    assert all(float(total) > 0 for total in kd.distillation.probe.total)


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _wrapped(model, name, base=nn.Module):
    """A model in a wrapper of this name, without the process group that the wrapper would need."""
    kind = type(name, (base,), {"__init__": nn.Module.__init__})
    wrapper = kind()
    wrapper.module = model
    return wrapper


class TestBadInput:
    def test_compiled_or_wrapped_models(self):
        model = detector("retinanet")
        with pytest.raises(ValueError, match="attach first, then compile"):
            attach(torch.compile(model), "lgd")
        for name in ("DistributedDataParallel", "MMDistributedDataParallel"):
            with pytest.raises(ValueError, match=rf"wrapped in {name}; attach first, then wrap it.*to its \.module"):
                attach(_wrapped(model, name, nn.parallel.DistributedDataParallel), "lgd")
        for name in ("DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "OtherWrapper"):
            with pytest.raises(ValueError, match=f"wrapped in {name}; of the wrappers only DistributedDataParallel is"):
                attach(_wrapped(model, name), "lgd")
        model.compile()
        with pytest.raises(ValueError, match="must not be compiled yet"):
            attach(model, "lgd")

    def test_two_attachments(self):
        model, kd = attached("retinanet")
        with pytest.raises(ValueError, match=r"attached already; call its detach\(\) first"):
            attach(model, "lgd")
        kd.detach()
        attach(model, "lgd").detach()

    def test_other_modules(self):
        with pytest.raises(TypeError, match=r"must be a torchvision detector, got Linear without transform, backbone"):
            attach(nn.Linear(1, 1), "lgd")

    def test_unknown_methods(self):
        with pytest.raises(ValueError, match=r"method must be one of .*'fgfi', 'icd', 'lgd', 'pkd'"):
            attach(detector("retinanet"), "idc")
        with pytest.raises(TypeError, match="method must be a name or a Distiller, got Linear"):
            attach(detector("retinanet"), nn.Linear(1, 1))
        with pytest.raises(ValueError, match="needs a host with anchors"):
            model, _ = attached("ssd", "fgfi")
            loss_of(model, "ssd")

    def test_no_teacher(self):
        with pytest.raises(ValueError, match="needs a teacher, got None"):
            attach(detector("retinanet"), "icd")

    def test_teacher_in_train_mode_or_with_other_classes(self):
        with pytest.warns(UserWarning, match=r"in train mode.*Call teacher.eval\(\)"):
            kd = attach(detector("retinanet"), "icd", teacher=teacher_of("retinanet").train())
        assert not kd.teacher.module.training
        with pytest.warns(UserWarning, match="the teacher knows 7 classes, the student 5"):
            attach(detector("retinanet"), "icd", teacher=detector("retinanet", classes=7).eval())

    def test_num_classes(self):
        with pytest.raises(ValueError, match="must be the object classes of the model, 5, got 7"):
            attach(detector("faster-rcnn"), "lgd", num_classes=7)
        model = detector("retinanet").train()
        attach(model, "lgd", num_classes=CLASSES - 1)  # a background at 0: labels 1..4
        images, targets = batch("retinanet")
        targets[0]["labels"][0] = 0
        with pytest.raises(ValueError, match=r"labels must be in \[1, 5\) for 4 classes, got 0"):
            model(images, targets)

    def test_targets_outside_of_the_image(self):
        model, _ = attached("retinanet")
        images, targets = batch("retinanet")
        targets[0]["boxes"][0] = torch.tensor([-30.0, 10, 500, 60])
        with pytest.warns(UserWarning, match="1 of 4 boxes reach out of their image"):
            losses = model(images, targets)
        assert all(value.isfinite() for value in losses.values())

    def test_pyramids_that_cannot_be_matched(self):
        class Coarse(nn.Module):
            def forward(self, images):
                return [images.new_zeros(len(images), 8, 1, 1)]

        model = detector("retinanet", min_size=256, max_size=256).train()
        model.backbone.fpn.extra_blocks = None
        model.anchor_generator.sizes = model.anchor_generator.sizes[:3]
        kd = attach(model, "icd", teacher=Coarse().eval(), num_classes=CLASSES)
        features = model.backbone(torch.zeros(1, 3, 256, 256))
        inputs = model.transform(*batch("retinanet", (1,), size=(256, 256)))
        with pytest.raises(ValueError, match=r"strides must be those of the student \[8, 16, 32\].*got \[256\]"):
            kd.distillation(kd._host_step(inputs, features))

    def test_forgotten_step(self, monkeypatch):
        monkeypatch.setattr("fastkd.integrations.attachment.WARN_AFTER", 2)
        model, kd = attached("retinanet", "fgfi")
        with no_warnings():
            loss_of(model, "retinanet")
        with pytest.warns(UserWarning, match=r"2 batches without kd.step\(\)"):
            loss_of(model, "retinanet")
        kd.step()
        with no_warnings():
            loss_of(model, "retinanet")

    def test_a_failure_never_loses_the_run(self):
        model, kd = attached("retinanet")
        kd.distillation.network = None
        images, targets = batch("retinanet")
        losses = model(images, targets)
        assert "icd_distill" in losses
        broken = [{**targets[0], "labels": targets[0]["labels"] * 0 + CLASSES + 9}, targets[1]]
        kd._host_step = _raise
        for failure in (1, 2, 3):
            with pytest.warns(UserWarning, match="batch trains alone" if failure < 3 else "goes on without distil"):
                losses = model(images, targets)
            assert set(losses) == {"classification", "bbox_regression"} and kd.state.failures == failure
        with no_warnings():
            model(images, targets)
        assert broken and "the last 3 batches failed" in kd.report()

    def test_the_first_batch_fails_loudly(self):
        model, kd = attached("retinanet")
        kd._host_step = _raise
        with pytest.raises(RuntimeError, match="broken"):
            loss_of(model, "retinanet")

    def test_a_failed_update_or_file_never_loses_the_run(self, tmp_path, monkeypatch):
        model, kd = attached("retinanet", "fgfi")
        loss_of(model, "retinanet")[1].backward()
        kd.try_to_save(tmp_path / "kd.pt")
        with pytest.warns(UserWarning, match="state could not be saved, the run goes on.*no such folder"):
            kd.try_to_save(tmp_path / "no such folder" / "kd.pt")
        monkeypatch.setattr(kd.distillation.optimizer, "step", _raise)
        kd.distillation.steps = 0
        with pytest.raises(RuntimeError, match="broken"):
            kd.step()
        with pytest.warns(UserWarning, match="the run goes on without distillation"):
            kd.step()
        assert set(model(*batch("retinanet"))) == {"classification", "bbox_regression"}

    def test_checkpoint_of_other_pyramids(self, tmp_path):
        model, kd = attached("retinanet")
        loss_of(model, "retinanet")
        kd.save(tmp_path / "kd.pt")
        other, other_kd = attached("faster-rcnn")
        other_kd.load(tmp_path / "kd.pt")
        other_kd.distillation._loaded["spec"][0][0] = 7
        with pytest.raises(ValueError, match="resume with the student and teacher of the first run"):
            loss_of(other, "faster-rcnn")
        with pytest.raises(ValueError, match="must be of format 2, got None"):
            kd.load_state_dict({})


def _raise(*args):
    raise RuntimeError("broken")


@pytest.mark.parametrize(("weight", "words"), [(1e3, "swamps the detection loss"), (1e-9, "hardly moves the student")])
def test_report_judges_the_share_once_it_has_settled(weight, words, monkeypatch):
    model, kd = attached("retinanet", "pkd", weight=weight)
    loss_of(model, "retinanet")[1].backward()
    assert words not in kd.report()
    monkeypatch.setattr("fastkd.integrations.report.SETTLED", 2)
    loss_of(model, "retinanet")[1].backward()
    assert words in kd.report()
