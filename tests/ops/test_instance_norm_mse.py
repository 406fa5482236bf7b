"""instance_norm_mse: the kernel of every instruction set against the reference, that against torch's own layers."""

import pytest
import torch
from kernels import DTYPES, LAYOUTS, channels_last, contiguous, strided, transposed
from tolerance import assert_no_worse
from torch.nn import functional

from fastkd.ops import instance_norm_mse, instance_norm_mse_reference

PYRAMID = [(2, 5, 19, 23), (2, 5, 8, 8), (2, 5, 3, 5), (2, 5, 1, 1)]
WIDE = [(2, 150, 6, 7), (2, 150, 1, 3)]  # whole channel blocks of every capability, whole vectors, single channels
LONG = [(2, 5, 40, 61)]  # more steps than the float sums are kept for
SHAPES = {
    "pyramid": PYRAMID,
    "wide": WIDE,
    "long": LONG,
    "one channel": [(3, 1, 9, 9)],
    "empty": [(0, 5, 4, 4), (0, 5, 2, 2)],
    "no cells": [(2, 5, 4, 4), (2, 5, 0, 3)],
}


def pyramids(shapes, dtype=torch.float32, student_layout=contiguous, teacher_layout=contiguous, make=torch.randn):
    """A student and a teacher of these shapes; leaves that require gradients."""
    sides = []
    for layout in (student_layout, teacher_layout):
        sides.append([layout((make(shape) + 0.5).to(dtype)).requires_grad_() for shape in shapes])
    return sides


def loss_and_gradients(op, student, teacher):
    loss = op(student, teacher)
    return [loss, *torch.autograd.grad(loss, [*student, *teacher])]


def double(levels):
    return [level.detach().double().requires_grad_() for level in levels]


def check(student, teacher):
    actual = loss_and_gradients(instance_norm_mse, student, teacher)
    plain = loss_and_gradients(instance_norm_mse_reference, student, teacher)
    exact = loss_and_gradients(instance_norm_mse_reference, double(student), double(teacher))
    assert_no_worse(actual, plain, exact)


def check_draws(draw, count=8):
    """`check`, with the results of several draws as one: a single small loss can be exact in plain torch by luck."""
    actual, plain, exact = [], [], []
    for _ in range(count):
        student, teacher = draw()
        actual.append(loss_and_gradients(instance_norm_mse, student, teacher))
        plain.append(loss_and_gradients(instance_norm_mse_reference, student, teacher))
        exact.append(loss_and_gradients(instance_norm_mse_reference, double(student), double(teacher)))
    assert_no_worse(*([torch.stack(results) for results in zip(*side)] for side in (actual, plain, exact)))


def test_reference_is_torchs_instance_norm_and_mse():
    student, teacher = pyramids(PYRAMID[:3], torch.float64)
    squares = [(functional.instance_norm(s) - functional.instance_norm(t)).square() for s, t in zip(student, teacher)]
    expected = torch.cat([square.flatten() for square in squares]).mean()
    actual = instance_norm_mse_reference(student, teacher)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(actual, student), torch.autograd.grad(expected, student), rtol=1e-11, atol=1e-16
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_no_worse_than_plain(capability, shapes, layout, dtype):
    check(*pyramids(shapes, dtype, layout, layout))


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_levels_beyond_the_caches(capability, layout, dtype):
    """Gradients of a mebibyte and more take paths of their own; rows of 72 x 59 cells begin anywhere in a line."""
    check(*pyramids([(2, 64, 72, 59)], dtype, layout, layout))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_float64(capability, shapes, layout):
    sides = pyramids(shapes, torch.float64, layout, layout)
    actual, expected = (loss_and_gradients(op, *sides) for op in (instance_norm_mse, instance_norm_mse_reference))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("layouts", [(contiguous, channels_last), (channels_last, contiguous), (strided, transposed)])
def test_mixed_and_strided_layouts(capability, layouts):
    check(*pyramids(PYRAMID, torch.float32, *layouts))


def shifted(shape):
    return torch.randn(shape) * 1e-2 + 1000


def constant(shape):
    return torch.full(shape, 0.1)


def tiny(shape):
    return torch.randn(shape) * 1e-4


def ramp(shape):
    return torch.linspace(-1000, 1000, shape[2] * shape[3]).view(1, 1, *shape[2:]).expand(shape) + torch.randn(shape)


@pytest.mark.sampled
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("make", [shifted, constant, tiny, ramp])
def test_hard_rows(capability, make, layout):
    check_draws(lambda: pyramids(PYRAMID + LONG, torch.float32, layout, layout, make))


@pytest.mark.sampled
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("factor, offset, noise", [(1 + 1e-5, 1e-6, 0), (2, 0, 0), (1, 0, 1e-3), (0.3, 5, 1e-2)])
def test_nearly_equal_pyramids(capability, factor, offset, noise, layout):
    def draw():
        student, _ = pyramids(PYRAMID + LONG, torch.float32, layout)
        teacher = [level.detach() * factor + offset + noise * torch.randn_like(level) for level in student]
        return student, [layout(level).requires_grad_() for level in teacher]

    check_draws(draw)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_equal_pyramids_give_exactly_nothing(capability, dtype):
    student, _ = pyramids(PYRAMID, dtype)
    teacher = [level.detach().clone() for level in student]
    loss = instance_norm_mse(student, teacher)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, student))


def test_a_level_of_one_cell_is_zero_and_counts_in_the_mean(capability):
    student, teacher = pyramids([(2, 3, 1, 1)])
    loss, *gradients = loss_and_gradients(instance_norm_mse, student, teacher)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients)
    more = pyramids([(2, 3, 2, 2)])
    together = instance_norm_mse(more[0] + student, more[1] + teacher)
    torch.testing.assert_close(together, instance_norm_mse(*more) * 24 / 30)


def test_nan_and_infinity_come_through(capability):
    for bad in (float("nan"), float("inf")):
        student, teacher = pyramids(PYRAMID)
        student[0].data[1, 2, 3, 4] = bad
        loss, *gradients = loss_and_gradients(instance_norm_mse, student, teacher)
        assert loss.isnan()
        assert gradients[0][1, 2].isnan().all()
        assert gradients[0][0].isfinite().all() and gradients[1].isfinite().all()


@pytest.mark.parametrize("sides", [(True, False), (False, True)])
def test_gradient_for_one_side(sides):
    student, teacher = pyramids(PYRAMID)
    both = loss_and_gradients(instance_norm_mse, student, teacher)[1:]
    for level in student + teacher:
        level.requires_grad_(sides[0] if any(level is one for one in student) else sides[1])
    wanted = student if sides[0] else teacher
    gradients = torch.autograd.grad(instance_norm_mse(student, teacher), wanted)
    expected = both[: len(student)] if sides[0] else both[len(student) :]
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected))
    student, teacher = ([level.detach() for level in side] for side in (student, teacher))
    assert not instance_norm_mse(student, teacher).requires_grad


def test_gradient_of_one_level_only():
    student, teacher = pyramids(PYRAMID)
    expected = loss_and_gradients(instance_norm_mse, student, teacher)[2]
    mixed = [level if index == 1 else level.detach() for index, level in enumerate(student)]
    loss = instance_norm_mse(mixed, [level.detach() for level in teacher])
    assert torch.equal(torch.autograd.grad(loss, student[1])[0], expected)


@pytest.mark.sampled
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_gradcheck(capability, layout, eps):
    student, teacher = pyramids([(2, 3, 4, 3), (2, 3, 1, 2)], torch.float64, layout, layout)

    def op(*levels):
        return instance_norm_mse(levels[:2], levels[2:], eps)

    assert torch.autograd.gradcheck(op, (*student, *teacher))


def test_mixed_dtypes_are_widened():
    student, teacher = pyramids(PYRAMID, torch.bfloat16)
    wide = [level.detach().float() for level in teacher]
    expected = instance_norm_mse([level.detach().float() for level in student], wide)
    loss = instance_norm_mse(student, wide)
    assert torch.equal(instance_norm_mse(student, teacher), expected) and torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, student)
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    assert instance_norm_mse(student, [level.double() for level in wide]).dtype == torch.float64


def test_rows_whose_first_guess_is_wrong(capability):
    """The guess of the mean looks at a few cells: where just those are far off, the row is summed again."""
    for layout in (contiguous, channels_last):
        student, teacher = pyramids([(2, 40, 40, 41)], torch.float32, layout, layout)
        with torch.no_grad():
            for place in range(1, 16, 2):
                y, x = divmod(1640 * place // 16, 41)
                student[0][:, ::2, y, x] += 1e4
                teacher[0][:, 1::2, y, x] -= 1e4
        check(student, teacher)


def draw(choose):
    dtype, layouts = choose.choice(DTYPES), (choose.choice(LAYOUTS), choose.choice(LAYOUTS))
    images, channels = choose.randint(1, 2), choose.choice([1, 3, 17, 40])
    # Not two cells: IN gives -1 and 1 there but for eps, so that most of the gradient is rounding, in plain torch too.
    sizes = [choose.choice([(1, 1), (choose.randint(1, 6), choose.randint(3, 9))]) for _ in range(choose.randint(1, 3))]
    shapes = [(images, channels, *size) for size in sizes]
    return [*pyramids(shapes, dtype, *layouts), choose.choice([1e-5, 1e-3])]


LEVEL = torch.zeros(1, 2, 3, 3)
BAD = [
    (ValueError, r"student must hold at least one level", [], [], 1e-5),
    (TypeError, r"student must be a list", LEVEL, [LEVEL], 1e-5),
    (TypeError, r"teacher\[0\] must be a tensor", [LEVEL], [[1.0]], 1e-5),
    (ValueError, r"teacher\[0\] must be \[B, C, H_l, W_l\], got \[2, 3, 3\]", [LEVEL], [LEVEL[0]], 1e-5),
    (TypeError, r"student\[0\] must be floating point, got torch.int64", [LEVEL.long()], [LEVEL], 1e-5),
    (ValueError, r"student must be float32, .* got torch.float8", [LEVEL.to(torch.float8_e5m2)], [LEVEL], 1e-5),
    (ValueError, r"teacher must be .* as the student, got", [LEVEL, LEVEL], [LEVEL], 1e-5),
    (ValueError, r"teacher must be .* as the student, got", [LEVEL], [LEVEL[..., 1:]], 1e-5),
    (ValueError, r"teacher must be on cpu as the student, got meta", [LEVEL], [LEVEL.to("meta")], 1e-5),
    (ValueError, r"teacher must be float32, .* got torch.float8", [LEVEL], [LEVEL.to(torch.float8_e5m2)], 1e-5),
    (ValueError, r"eps must be finite and not negative, got -1", [LEVEL], [LEVEL], -1),
    (TypeError, r"eps must be a number, got str", [LEVEL], [LEVEL], "small"),
    (ValueError, r"eps must be finite and not negative, got nan", [LEVEL], [LEVEL], float("nan")),
]  # fmt: skip


@pytest.mark.parametrize("error, message, student, teacher, eps", BAD, ids=[case[1][:40] for case in BAD])
def test_bad_arguments(error, message, student, teacher, eps):
    with pytest.raises(error, match=f"^instance_norm_mse: {message}"):
        instance_norm_mse(student, teacher, eps)


def test_the_raw_op_checks_what_could_corrupt_memory():
    raw, backward = torch.ops.fastkd.instance_norm_mse, torch.ops.fastkd.instance_norm_mse_backward
    loss, moments = raw([LEVEL], [LEVEL], 1e-5)
    bad = [([LEVEL], [LEVEL[..., 1:]]), ([LEVEL], [LEVEL.double()]), ([LEVEL], []), ([LEVEL[0]], [LEVEL[0]])]
    for student, teacher in bad:
        with pytest.raises(RuntimeError, match=r"instance_norm_mse: .* must"):
            raw(student, teacher, 1e-5)
    for grad, other in [(loss, moments[:, :1]), (loss.double(), moments), (moments, moments), (loss, moments.double())]:
        with pytest.raises(RuntimeError, match=r"instance_norm_mse_backward: .* must"):
            backward(grad, [LEVEL], [LEVEL], other, True, True)


def test_an_unknown_capability_is_an_error(monkeypatch):
    monkeypatch.setenv("FASTKD_CPU_CAPABILITY", "sse2")
    with pytest.raises(RuntimeError, match="must be generic, avx2, avx512 or avx512_bf16, got sse2"):
        instance_norm_mse([LEVEL], [LEVEL])
