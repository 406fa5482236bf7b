"""CWD against a literal transcription of its formula."""

import pytest
import torch
from imitation_cases import COUNTS, DTYPES, assert_follows, assert_refuses, pyramids
from ragged import ragged_batch

from fastkd.distillers import CWD


def transcription(module, student, teacher):
    """Sum over images and channels of p log(p / q)."""
    total = 0
    for level, target in zip(student, teacher):
        level = module.adapter(level)
        images, channels = target.shape[:2]
        p = (target / module.tau).flatten(2).softmax(2)
        q = (level / module.tau).flatten(2).softmax(2)
        total = total + module.tau**2 / (channels * images) * (p * (p.log() - q.log())).sum()
    return module.weight * total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("channels", "tau"), [(8, 1.0), (12, 2.5)])
def test_cwd_is_its_formula(channels, tau, counts, dtype):
    torch.manual_seed(0)
    module = CWD(8, teacher_channels=channels, tau=tau).to(dtype)
    assert len(list(module.parameters())) == (0 if channels == 8 else 2)
    student, teacher = pyramids(len(counts), 8, channels, dtype)
    assert_follows(module, transcription, student, teacher, ragged_batch(counts))


def test_cwd_sees_where_and_not_how_much():
    student, teacher = pyramids(2, 8, 8, torch.float64)
    batch, module = ragged_batch((1, 2)), CWD(8)
    (loss,) = module([level + 7 for level in teacher], batch, teacher).losses.values()
    assert abs(loss) < 1e-9
    assert module(student, batch, teacher).losses["cwd_distill"] > 0.1
    assert module(student, batch, teacher, detach_student=True).losses["cwd_distill"].requires_grad is False


def test_cwd_refuses():
    assert_refuses(lambda **options: CWD(8, **options), "CWD: weight must be at least 0, got -1.0")
    with pytest.raises(ValueError, match="CWD: tau must be > 0, got 0"):
        CWD(8, tau=0)
