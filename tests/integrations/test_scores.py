"""Class scores of a teacher's cells against the outputs of its own forward pass."""

import pytest
import torch
from torchvision_cases import batch, detector

from fastkd.integrations.known_teachers import pick_teacher
from fastkd.integrations.scores import cell_scores
from fastkd.integrations.teachers import Normalization


def scores_of(model, images, classes):
    """Of a teacher's levels: [B, cells of all levels]."""
    teacher = pick_teacher(model, classes)
    sizes = torch.tensor([images.shape[-2:]] * len(images))
    levels = teacher.pyramid(images, sizes, teacher.normalization or Normalization())
    scores = teacher.cell_scores(levels)
    for score, level in zip(scores, levels, strict=True):
        assert score.shape == (len(images), 1, *level.shape[2:]) and score.dtype == torch.float32
    return torch.cat([score.flatten(1) for score in scores], 1)


@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd"])
def test_torchvision(name):
    model = detector(name).eval()
    images = model.transform(batch(name)[0])[0].tensors
    seen = {}
    model.head.register_forward_hook(lambda module, args, output: seen.update(output))
    with torch.no_grad():
        model(batch(name)[0])
    logits, anchors = seen["cls_logits"], model.anchor_generator.num_anchors_per_location()
    assert len(set(anchors)) == 1
    each = logits.softmax(2)[..., 1:] if name == "ssd" else logits.sigmoid()
    expected = each.unflatten(1, (-1, anchors[0])).amax((2, 3))
    torch.testing.assert_close(scores_of(model, images, 5), expected, rtol=1e-4, atol=1e-6)


def test_objectness_of_two_stage_detectors():
    model = detector("faster-rcnn").eval()
    images = model.transform(batch("faster-rcnn")[0])[0].tensors
    with torch.no_grad():
        logits, _ = model.rpn.head(list(model.backbone(images).values()))
    expected = torch.cat([level.sigmoid().amax(1).flatten(1) for level in logits], 1)
    torch.testing.assert_close(scores_of(model, images, 5), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["RTDetr", "RTDetrV2", "DFine"])
def test_transformers(kind):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install .[hosts])")
    from transformers_cases import batch, model_of

    model, images = model_of(kind).eval(), batch()["pixel_values"]
    with torch.no_grad():
        expected = model(images).enc_outputs_class.sigmoid().amax(2)
    torch.testing.assert_close(scores_of(model, images, 5), expected, rtol=1e-4, atol=1e-6)


def test_ultralytics():
    pytest.importorskip("ultralytics", reason="ultralytics cannot be imported", exc_type=ImportError)
    from host_cases import HOSTS

    model, images = HOSTS["ultralytics"]().teacher(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        _, raw = model(images)
    torch.testing.assert_close(scores_of(model, images, 3), raw["scores"].sigmoid().amax(1), rtol=1e-4, atol=1e-6)


def test_unknown_modules_have_none():
    assert cell_scores(torch.nn.Linear(1, 1)) is None
