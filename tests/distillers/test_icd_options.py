"""ICD's options beyond the paper: the scale of the teacher's pyramid and the projections' initialisation."""

import copy

import pytest
import torch
from ragged import priors, ragged_batch, ragged_pyramid

from fastkd.distillers import ICD


def distiller(**options):
    torch.manual_seed(0)
    return ICD(3, priors(3), 16, heads=4, **options)


def pyramids():
    return ragged_pyramid(2, 16, seed=1, dtype=torch.float32), ragged_pyramid(2, 16, seed=2, dtype=torch.float32)


def test_projections_of_equal_width_start_equal_and_learn_apart():
    icd = distiller(layers=2)
    for own, layer in zip(icd.student_values, icd.decoder, strict=True):
        assert torch.equal(own.weight, layer.value.weight) and own.weight is not layer.value.weight
    student, teacher = pyramids()
    losses = icd(student, ragged_batch([2, 3]), teacher).losses
    sum(losses.values()).backward()
    assert not torch.allclose(icd.student_values[0].weight.grad, icd.decoder[0].value.weight.grad)


def test_a_student_equal_to_its_teacher_starts_with_nothing_to_learn():
    icd, batch = distiller(), ragged_batch([2, 3])
    student, teacher = pyramids()
    assert icd(teacher, batch, teacher).losses["icd_distill"].item() == pytest.approx(0.0, abs=1e-8)
    assert icd(student, batch, teacher).losses["icd_distill"] > 0.1


def test_projections_of_another_width_start_on_their_own():
    icd = distiller(teacher_channels=24)
    assert icd.student_values[0].weight.shape == (16, 16) and icd.decoder[0].value.weight.shape == (16, 24)


def test_teacher_scale_is_a_factor_on_the_pyramid():
    plain, batch = distiller(), ragged_batch([2, 3])
    scaled = copy.deepcopy(plain)
    scaled.teacher_scale = 0.25
    student, teacher = pyramids()
    expected = plain(student, batch, [level * 0.25 for level in teacher]).losses
    found = scaled(student, batch, teacher).losses
    for name, value in expected.items():
        assert torch.allclose(found[name], value)
    assert not torch.allclose(found["icd_distill"], plain(student, batch, teacher).losses["icd_distill"])
    maps, wanted = scaled.attention(teacher, batch), plain.attention([level * 0.25 for level in teacher], batch)
    assert all(torch.allclose(a, b) for a, b in zip(maps, wanted, strict=True))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="teacher_scale must be > 0"):
        distiller(teacher_scale=scale)
