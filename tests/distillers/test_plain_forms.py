"""The baselines of `benchmarks.step` compute the same losses and gradients as fastkd."""

import dataclasses

import pytest
import torch
from detector_cases import rectangles
from ragged import priors, ragged_batch, ragged_pyramid

from benchmarks.step.dispatch_ledger import count
from benchmarks.step.plain_detectors import PlainDetector
from fastkd.detectors import DetectorConfig, build_detector
from fastkd.distillers import ICD, LGD
from fastkd.ops import use_backend

CHANNELS, CLASSES = 16, 3
COUNTS = (3, 3)
LEVELS = ((8, 12), (4, 6), (2, 3))  # torch has no instance norm of one cell


def inputs():
    student, teacher = (ragged_pyramid(2, CHANNELS, levels=LEVELS, seed=seed, dtype=torch.float32) for seed in (0, 1))
    return student, [level.detach() for level in teacher], ragged_batch(COUNTS)


def assert_same_gradients(ours, plain, wanted):
    """Gradients of two scalars by the same tensors agree, each up to rounding relative to its size."""
    for one, other in zip(*(torch.autograd.grad(total, wanted, allow_unused=True) for total in (ours, plain))):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize("options", [{}, {"context": False, "detach_appearance": True}], ids=str)
def test_plain_lgd(options):
    """LGD under the reference backend: no kernel of ours, and the losses and gradients of the compiled ops."""
    student, _, batch = inputs()
    lgd = LGD(CLASSES, CHANNELS, heads=2, **options)
    weights = [torch.randn_like(level) / 1000 for level in student]
    found = []
    for backend in ("compiled", "reference"):
        with use_backend(backend):
            made = lgd(student, batch)
            counts = count(lambda: sum(level.sum() for level in lgd(student, batch).instructive).backward())
        assert backend == "compiled" or not any(op.startswith("fastkd::") for op in counts.by_op)
        total = made.losses["lgd_distill"] + sum((a * b).sum() for a, b in zip(made.instructive, weights))
        found.append((made, total))
    (ours, our_total), (plain, plain_total) = found
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-4, atol=0)
    assert all(level.abs().max() > 0.1 for level in ours.instructive)
    torch.testing.assert_close(ours.instructive, plain.instructive, rtol=1e-3, atol=1e-4)
    assert_same_gradients(our_total, plain_total, [*student, *lgd.parameters()])


@pytest.mark.parametrize("layers", [1, 2])
def test_icd_on_reference_ops(layers):
    student, teacher, batch = inputs()
    icd, found = ICD(CLASSES, priors(CLASSES), CHANNELS, heads=4, layers=layers), []
    for backend in ("compiled", "reference"):
        with use_backend(backend):
            found.append(icd(student, batch, teacher).losses)
    ours, plain = found
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=0)
    assert_same_gradients(sum(ours.values()), sum(plain.values()), [*student, *icd.parameters()])


def test_plain_retinanet():
    ours = build_detector(DetectorConfig(num_classes=CLASSES))
    plain = PlainDetector("retinanet", CLASSES)
    names = {"backbone.": "model.backbone.body.", "neck.": "model.backbone.fpn.", "head.": "model.head."}
    state = {}
    for name, value in ours.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        state[names[prefix] + name.removeprefix(prefix)] = value
    plain.load_state_dict(state)
    for module in plain.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-5  # torchvision's frozen norms here have 0
    batch = rectangles([2, 2], size=(128, 128), masks=False)
    pyramid = ours.features(batch.images)
    for level, other in zip(pyramid, plain.features(batch.images), strict=True):
        torch.testing.assert_close(level, other, rtol=1e-3, atol=1e-4)
    theirs = plain.loss(pyramid, batch)
    torch.testing.assert_close(list(ours.loss(pyramid, batch).values()), list(theirs.values()), rtol=1e-4, atol=1e-6)


def test_plain_faster_rcnn_has_losses_that_train():
    plain = PlainDetector("faster_rcnn", CLASSES)
    batch = dataclasses.replace(rectangles([2]), masks=None)
    losses = plain.loss(plain.features(batch.images), batch)
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in plain.model.roi_heads.parameters())
