"""masked_mse: the kernel of every instruction set against the reference (test_ops_reference: that against loops)."""

import math

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

from fastkd.ops import masked_mse, masked_mse_reference

SIZES = [(9, 13), (3, 5), (1, 1), (0, 3)]
SHAPES = [(2, 37), (1, 16), (3, 1), (0, 4)]  # images, channels


def pyramids(shape=(2, 5), dtype=torch.float32, layout=contiguous, share=0.3, sizes=SIZES):
    """Student (leaves), teacher, masks with about this share of the cells."""
    student, teacher = ([layout(torch.randn(*shape, *size).to(dtype)) for size in sizes] for _ in range(2))
    masks = [torch.rand(shape[0], *size) < share for size in sizes]
    return [level.requires_grad_() for level in student], teacher, masks


def draw(choose):
    dtype, layout = choose.choice(DTYPES), choose.choice(LAYOUTS)
    sizes = [(choose.randint(1, 6), choose.randint(1, 8)) for _ in range(choose.randint(1, 3))]
    shape = choose.randint(1, 3), choose.choice([1, 3, 16, 21])
    return list(pyramids(shape, dtype, layout, choose.choice([0, 0.1, 0.5, 1]), sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_no_worse_than_plain(capability, layout, dtype):
    for shape in SHAPES:
        for share in (0.05, 0.5, 1):
            check(masked_mse, masked_mse_reference, pyramids(shape, dtype, layout, share))


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_levels_beyond_the_caches(capability, layout, dtype):
    """Gradients of a mebibyte and more take paths of their own; rows of 72 x 59 cells begin anywhere in a line."""
    for share in (0.02, 0.5):
        check(masked_mse, masked_mse_reference, pyramids((2, 64), dtype, layout, share, [(72, 59)]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64(capability, layout):
    for shape in SHAPES:
        close_to_float64(masked_mse, masked_mse_reference, pyramids(shape, torch.float64, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_what_is_outside_the_mask_does_not_matter(capability, layout, dtype):
    student, teacher, masks = pyramids((2, 37), dtype, layout)
    expected = masked_mse(student, teacher, masks)
    gradients = torch.autograd.grad(expected[0], student)
    for levels, bad in ((student, math.inf), (teacher, math.nan)):
        for level, mask in zip(levels, masks):
            level.data.permute(0, 2, 3, 1)[~mask] = bad
    found = masked_mse(student, teacher, masks)
    assert found == expected
    for one, other, mask in zip(torch.autograd.grad(found[0], student), gradients, masks):
        assert torch.equal(one, other)
        assert not one.permute(0, 2, 3, 1)[~mask].any()


def test_an_empty_mask_gives_zeros(capability):
    student, teacher, masks = pyramids(share=0)
    error, count = masked_mse(student, teacher, masks)
    assert error == 0 and count == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(error, student))


@pytest.mark.parametrize("layout", [contiguous, channels_last, expanded])
def test_gradcheck(capability, layout):
    student, teacher, masks = pyramids((2, 3), torch.float64, sizes=[(2, 3), (1, 1)])
    assert torch.autograd.gradcheck(
        lambda *levels: masked_mse([layout(level) for level in levels], teacher, masks)[0], student
    )


def test_only_the_student_receives_a_gradient():
    student, teacher, masks = pyramids()
    for level in teacher:
        level.requires_grad_()
    error, count = masked_mse(student, teacher, masks)
    assert not count.requires_grad
    assert torch.autograd.grad(error, teacher, allow_unused=True) == (None,) * len(teacher)


def test_mixed_dtypes_are_widened():
    student, teacher, masks = pyramids(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = masked_mse(student, [level.float() for level in teacher], masks)
    assert found[0].dtype == torch.float32 and found == masked_mse(student, teacher, masks)
    assert torch.autograd.grad(found[0], student)[0].dtype == torch.bfloat16


LEVEL, MASK = torch.zeros(1, 4, 3, 3), torch.zeros(1, 3, 3, dtype=torch.bool)
BAD = [
    (ValueError, r"student must be float32, .* got torch.float8", [LEVEL.to(torch.float8_e5m2)], [LEVEL], [MASK]),
    (ValueError, r"teacher must have the student's 4", [LEVEL], [LEVEL[:, 1:]], [MASK]),
    (ValueError, r"teacher must be on cpu", [LEVEL], [LEVEL.to("meta")], [MASK]),
    (TypeError, r"masks must be a list", [LEVEL], [LEVEL], MASK),
    (ValueError, r"masks must hold 1 levels, got 2", [LEVEL], [LEVEL], [MASK, MASK]),
    (ValueError, r"masks\[0\] must be bool \[1, 3, 3\]", [LEVEL], [LEVEL], [MASK.float()]),
    (ValueError, r"masks\[0\] must be on cpu", [LEVEL], [LEVEL], [MASK.to("meta")]),
]


@pytest.mark.parametrize("error, message, student, teacher, masks", BAD, ids=[case[1][:30] for case in BAD])
def test_bad_arguments(error, message, student, teacher, masks):
    with pytest.raises(error, match=f"^masked_mse: {message}"):
        masked_mse(student, teacher, masks)
