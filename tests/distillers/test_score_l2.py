"""Score-weighted L2 against a literal transcription of its formula, and the scores of detectors."""

import pytest
import torch
from imitation_cases import COUNTS, DTYPES, assert_follows, assert_refuses, pyramids
from ragged import ragged_batch
from tiny_runs import KINDS, tiny_detector

from fastkd.detectors import build_detector
from fastkd.distillers import ScoreL2
from fastkd.distillers import score_l2 as score_l2_file


def transcription(module, student, teacher, scores):
    """Level by level and channel by channel."""
    total = 0
    for adapter, level, target, score in zip(module.adapters, student, teacher, scores):
        level = adapter(level)
        error = 0
        for channel in range(target.shape[1]):
            error = error + (score[:, 0] * (level[:, channel] - target[:, channel]) ** 2).sum()
        total = total + error / (score.sum() * target.shape[1] + 1e-9)
    return module.weight * total


def scores_of(teacher):
    return [level[:, :1].sigmoid() for level in teacher]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("channels", [8, 12])
def test_score_l2_is_its_formula(channels, counts, dtype):
    torch.manual_seed(0)
    module = ScoreL2(8, teacher_channels=channels, levels=4).to(dtype)
    student, teacher = pyramids(len(counts), 8, channels, dtype)
    assert_follows(module, transcription, student, teacher, ragged_batch(counts), scores=scores_of(teacher))


def test_only_scored_cells_are_imitated():
    student, teacher = pyramids(2, 8, 8, torch.float32)
    module, batch = ScoreL2(8, levels=4), ragged_batch((1, 2))
    scores = [torch.zeros_like(level[:, :1]) for level in teacher]
    (loss,) = module(student, batch, teacher, scores=scores).losses.values()
    assert loss == 0
    scores[0][1, 0, 2, 3] = 0.7
    grads = torch.autograd.grad(module(student, batch, teacher, scores=scores).losses["scorel2_distill"], student)
    touched = grads[0].abs().sum(1).nonzero().tolist()
    assert touched == [[1, 2, 3]] and not any(grad.any() for grad in grads[1:])
    detached = module(student, batch, teacher, scores=scores, detach_student=True).losses["scorel2_distill"]
    assert torch.autograd.grad(detached, student, allow_unused=True, retain_graph=True) == (None,) * 4
    assert all(grad is not None for grad in torch.autograd.grad(detached, list(module.parameters())))


def test_the_sum_of_scores_is_that_of_all_processes(monkeypatch):
    """The divisor is averaged over processes, so that the mean of their losses is the whole batch's."""
    student, teacher = pyramids(2, 8, 8, torch.float32)
    module, batch = ScoreL2(8, levels=4), ragged_batch((1, 2))
    (alone,) = module(student, batch, teacher, scores=scores_of(teacher)).losses.values()
    monkeypatch.setattr(score_l2_file, "global_mean", lambda count: 2 * count)
    (shared,) = module(student, batch, teacher, scores=scores_of(teacher)).losses.values()
    assert shared.item() == pytest.approx(alone.item() / 2, rel=1e-5)


def test_score_l2_refuses():
    build = lambda **options: ScoreL2(8, levels=4, **options)  # noqa: E731
    assert_refuses(build, "ScoreL2: weight must be at least 0, got -1.0")
    student, teacher = pyramids(2, 8, 8, torch.float32)
    with pytest.raises(ValueError, match="ScoreL2: scores must be given, got None"):
        build()(student, ragged_batch((1, 2)), teacher)
    with pytest.raises(ValueError, match="ScoreL2: student must have 5 levels, got 4"):
        ScoreL2(8)(student, ragged_batch((1, 2)), teacher, scores=scores_of(teacher))
    with pytest.raises(ValueError, match="ScoreL2: levels must be at least 1"):
        ScoreL2(8, levels=0)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_cells_of_every_detector(kind):
    torch.manual_seed(0)
    detector = build_detector(tiny_detector(kind)).eval()
    pyramid = detector.features(torch.randn(2, 3, 64, 96))
    if kind == "solov2":
        with pytest.raises(ValueError, match="cell_scores: the detector must score its cells, got a SOLOv2"):
            detector.cell_scores(pyramid)
        return
    scores = detector.cell_scores(pyramid)
    assert [score.shape for score in scores] == [(2, 1, *level.shape[2:]) for level in pyramid]
    assert all(float(score.min()) > 0 and float(score.max()) < 1 for score in scores)


def test_scores_are_the_highest_of_a_cell():
    """RetinaNet: maximum over all classes and anchors of a cell, in the order of its head."""
    torch.manual_seed(0)
    detector = build_detector(tiny_detector("retinanet")).eval()
    pyramid = detector.features(torch.randn(1, 3, 64, 64))
    logits = detector.head(pyramid)["cls_logits"]
    sizes = [level.shape[2] * level.shape[3] * detector.anchors.per_cell for level in pyramid]
    for level, own, score in zip(pyramid, logits.split(sizes, dim=1), detector.cell_scores(pyramid), strict=True):
        expected = own.sigmoid().reshape(1, *level.shape[2:], -1).amax(3)
        torch.testing.assert_close(score[:, 0], expected)
