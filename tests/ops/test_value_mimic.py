"""value_mimic: the kernel of every instruction set against the reference (test_ops_reference: that against loops)."""

import pytest
import torch
from kernels import (
    DTYPES,
    LAYOUTS,
    channels_last,
    check,
    close_to_float64,
    contiguous,
    expanded,
)

from fastkd.ops import value_mimic, value_mimic_reference

SIZES = [(7, 10), (3, 11), (1, 1), (0, 3)]  # whole tiles of cells and parts of one
SHAPES = {"heads": (2, 8, 4), "one head": (2, 1, 37), "one channel": (1, 3, 1), "wide": (1, 2, 32), "empty": (0, 2, 4)}


def pyramids(shape=(2, 2, 8), dtype=torch.float32, layout=contiguous, mass_layout=contiguous, sizes=SIZES, offset=0.5):
    """Student (leaves), teacher and mass with a head that looks nowhere; shape = images, heads, channels of a head."""
    images, heads, depth = shape
    student, teacher = (
        [layout((torch.randn(images, heads * depth, *size) + offset).to(dtype)) for size in sizes] for _ in range(2)
    )
    mass = [mass_layout(torch.rand(images, heads, *size).square() / 100) for size in sizes]
    for level in mass:
        level[:1, :1] = 0
    if dtype == torch.float64:
        mass = [level.double() for level in mass]
    return [level.requires_grad_() for level in student], teacher, mass


def draw(choose):
    dtype, layout, mass_layout = choose.choice(DTYPES), choose.choice(LAYOUTS), choose.choice(LAYOUTS)
    shape = choose.randint(1, 2), choose.randint(1, 4), choose.choice([1, 3, 4, 8, 17])
    sizes = [(choose.randint(1, 6), choose.randint(1, 8)) for _ in range(choose.randint(1, 2))]
    eps = choose.choice([1e-5, 1e-3])
    return [*pyramids(shape, dtype, layout, mass_layout, sizes, choose.choice([0.0, 1.0])), eps]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_no_worse_than_plain(capability, layout, dtype):
    for shape in SHAPES.values():
        check(value_mimic, value_mimic_reference, pyramids(shape, dtype, layout, layout))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_levels_beyond_the_caches(capability, dtype):
    """Gradients of a mebibyte an image are written past the caches, where their rows begin cache lines."""
    check(value_mimic, value_mimic_reference, pyramids((1, 2, 32), dtype, sizes=[(60, 140), (60, 141)]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64(capability, layout):
    for shape in SHAPES.values():
        close_to_float64(value_mimic, value_mimic_reference, pyramids(shape, torch.float64, layout, layout))


def shifted(level):
    return level * 1e-2 + 1000


def alike(level):
    return level * 1e-4 + torch.linspace(0, 1, level.shape[1])[:, None, None]


@pytest.mark.parametrize("change", [shifted, alike])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_hard_values(capability, change, layout):
    for shape in ((2, 6, 8), (2, 6, 70)):  # many results: a single one can be exact in plain torch by luck
        student, teacher, mass = pyramids(shape)
        sides = [[layout(change(level.detach())) for level in side] for side in (student, teacher)]
        check(value_mimic, value_mimic_reference, [[level.requires_grad_() for level in sides[0]], sides[1], mass])


def test_equal_values_give_exactly_nothing(capability):
    student, _, mass = pyramids()
    loss = value_mimic(student, [level.detach().clone() for level in student], mass)
    assert not loss.any()
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss.sum(), student))


def test_little_mass_is_divided_by_1e_6(capability):
    student, teacher, mass = pyramids()
    small = [level * 1e-9 for level in mass]
    check(value_mimic, value_mimic_reference, [student, teacher, small])
    assert value_mimic(student, teacher, mass)[0, 0] == 0


def test_nan_comes_through(capability):
    student, teacher, mass = pyramids()
    student[0].data[1, 9, 2, 3] = float("nan")
    loss = value_mimic(student, teacher, mass)
    assert loss.isnan().tolist() == [[False, False], [False, True]]
    gradients = torch.autograd.grad(loss[0].sum(), student)
    assert all(gradient[0].isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("layout", [contiguous, channels_last, expanded])
def test_gradcheck(capability, layout):
    student, teacher, mass = pyramids((2, 2, 3), torch.float64, sizes=[(2, 3), (1, 1)])
    assert torch.autograd.gradcheck(
        lambda *levels: value_mimic([layout(level) for level in levels], teacher, mass), student, fast_mode=True
    )


def test_only_the_student_receives_a_gradient():
    student, teacher, mass = pyramids()
    for level in teacher + mass:
        level.requires_grad_()
    loss = value_mimic(student, teacher, mass).sum()
    gradients = torch.autograd.grad(loss, teacher + mass, allow_unused=True)
    assert gradients == (None,) * len(gradients)
    assert not value_mimic([level.detach() for level in student], teacher, mass).requires_grad


def test_mixed_dtypes_are_widened():
    """Under autocast projections are bfloat16, the mass float32; float64 anywhere gives float64."""
    student, teacher, mass = pyramids(dtype=torch.bfloat16)
    wide = [level.float() for level in teacher]
    with torch.autocast("cpu", torch.bfloat16):
        loss = value_mimic(student, wide, mass)
    assert loss.dtype == torch.float32 and torch.equal(loss, value_mimic(student, teacher, mass))
    assert torch.autograd.grad(loss.sum(), student)[0].dtype == torch.bfloat16
    assert value_mimic(student, teacher, [level.double() for level in mass]).dtype == torch.float64


LEVEL = torch.zeros(1, 4, 3, 3)
BAD = [
    (ValueError, r"student must be float32, .* got torch.float8", [LEVEL.to(torch.float8_e5m2)], [LEVEL], [LEVEL], 0),
    (ValueError, r"teacher must have the student's 4", [LEVEL], [LEVEL[:, 1:]], [LEVEL], 0),
    (ValueError, r"teacher must be on cpu", [LEVEL], [LEVEL.to("meta")], [LEVEL], 0),
    (ValueError, r"mass must have the images and cells", [LEVEL], [LEVEL], [LEVEL[..., 1:]], 0),
    (ValueError, r"mass must have a number of heads", [LEVEL], [LEVEL], [LEVEL[:, :0]], 0),
    (ValueError, r"eps must be finite and not negative, got -1", [LEVEL], [LEVEL], [LEVEL], -1),
    (TypeError, r"eps must be a number, got str", [LEVEL], [LEVEL], [LEVEL], "small"),
]


@pytest.mark.parametrize("error, message, student, teacher, mass, eps", BAD, ids=[case[1][:30] for case in BAD])
def test_bad_arguments(error, message, student, teacher, mass, eps):
    with pytest.raises(error, match=f"^value_mimic: {message}"):
        value_mimic(student, teacher, mass, eps)
