"""PKD against a literal transcription of its formula."""

import pytest
import torch
from imitation_cases import COUNTS, DTYPES, assert_follows, assert_refuses, pyramids
from ragged import ragged_batch

from fastkd.distillers import PKD


def transcription(module, student, teacher):
    """Level by level and channel by channel."""
    total = 0
    for level, target in zip(student, teacher):
        level = module.adapter(level)
        errors = []
        for one, other in zip(level.unbind(1), target.unbind(1)):
            sides = []
            for values in (one, other):
                cells = values.numel()
                std = ((values - values.mean()).square().sum() / max(cells - 1, 1)).sqrt() if cells > 1 else 0.0
                sides.append((values - values.mean()) / (std + 1e-6))
            errors.append((sides[0] - sides[1]).square().mean())
        total = total + torch.stack(errors).mean() / 2
    return module.weight * total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("channels", [8, 12])
def test_pkd_is_its_formula(channels, counts, dtype):
    torch.manual_seed(0)
    module = PKD(8, teacher_channels=channels).to(dtype)
    assert len(list(module.parameters())) == (0 if channels == 8 else 2)
    student, teacher = pyramids(len(counts), 8, channels, dtype)
    assert_follows(module, transcription, student, teacher, ragged_batch(counts))


def test_pkd_sees_patterns_and_not_magnitudes():
    student, teacher = pyramids(2, 8, 8, torch.float64)
    batch, module = ragged_batch((1, 2)), PKD(8)
    (loss,) = module([3 * level + 5 for level in teacher], batch, teacher).losses.values()
    assert loss < 1e-9
    (loss,) = module([-level for level in teacher[:3]], batch, teacher[:3]).losses.values()
    expected = 6 * sum(2 * (1 - 1 / level[:, 0].numel()) for level in teacher[:3])  # 1 - correlation, unbiased
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert module(student, batch, teacher, detach_student=True).losses["pkd_distill"].requires_grad is False


def test_pkd_refuses():
    assert_refuses(lambda **options: PKD(8, **options), "PKD: weight must be at least 0, got -1.0")
