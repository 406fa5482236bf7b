"""The CUDA source of instance_norm_mse, run by the emulation, against the reference."""

import pytest
import simt
import torch
from kernels import DTYPES, channels_last, contiguous, strided
from tolerance import assert_no_worse

from fastkd.ops import instance_norm_mse_reference

PYRAMID = [(2, 5, 9, 11), (2, 5, 4, 4), (2, 5, 1, 3), (2, 5, 1, 1)]
SHAPES = {
    "pyramid": PYRAMID,
    "packs of channels": [(1, 40, 3, 50), (1, 40, 2, 2)],  # more cells than a chunk; a group that is not full
    "wide": [(2, 136, 2, 3)],  # two groups of channels
    "long": [(1, 2, 37, 41)],  # more cells than threads
    "empty": [(0, 5, 4, 4), (0, 5, 2, 2)],
    "no cells": [(2, 5, 4, 4), (2, 5, 0, 3)],
}


def emulated(student, teacher, **settings):
    """Loss and gradients of both sides."""
    levels = [[level.detach() for level in side] for side in (student, teacher)]
    loss, moments = simt.run("instance_norm_mse", *levels, 1e-5, **settings)
    arguments = (torch.ones_like(loss), *levels, moments, True, True)
    return [loss, *simt.run("instance_norm_mse_backward", *arguments, **settings)]


def reference(student, teacher):
    loss = instance_norm_mse_reference(student, teacher)
    return [loss, *torch.autograd.grad(loss, [*student, *teacher])]


def pyramids(shapes, dtype=torch.float32, student_layout=contiguous, teacher_layout=contiguous, shift=0.5):
    sides = []
    for layout in (student_layout, teacher_layout):
        sides.append([layout((torch.randn(shape) + shift).to(dtype)).requires_grad_() for shape in shapes])
    return sides


def check(sides, **settings):
    exact = reference(*([level.detach().double().requires_grad_() for level in side] for side in sides))
    actual = emulated(*sides, **settings)
    assert_no_worse(actual, reference(*sides), exact)
    return actual


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_no_worse_than_plain(shapes, layout, dtype):
    check(pyramids(shapes, dtype, layout, layout))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_wide_index(layout):
    """More elements than the narrow index of the emulation has."""
    check(pyramids([(1, 3, 120, 93)], torch.bfloat16, layout, layout))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_float64(layout):
    sides = pyramids(PYRAMID, torch.float64, layout, layout)
    torch.testing.assert_close(emulated(*sides), reference(*sides), rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("layouts", [(contiguous, channels_last), (channels_last, contiguous), (strided, contiguous)])
def test_mixed_layouts(layouts):
    check(pyramids(PYRAMID, torch.float32, *layouts))


def test_rows_too_long_for_shared_memory():
    sides = pyramids([(1, 2, 37, 41), (1, 2, 5, 5)])
    for limit in (96 * 1024, 2048):
        check(sides, shared_bytes=limit)


@pytest.mark.parametrize("card", simt.SHARED_LIMITS)
@pytest.mark.parametrize("cells, dtype", [((96, 128), torch.float16), ((96, 128), torch.bfloat16),
                                          ((96, 128), torch.float32), ((48, 128), torch.float32)])  # fmt: skip
def test_static_and_dynamic_shared_memory_together(cells, dtype, card):
    """Rows of 48 KB, P3 of 768 x 1024 in half types, need more with the static array; rows of 96 KB fit every card.

    The short rows of the other two levels have a launch of their own.
    """
    check(pyramids([(1, 1, *cells), (1, 1, 6, 8), (1, 1, 3, 4)], dtype), shared_bytes=simt.SHARED_LIMITS[card])


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_equal_pyramids_give_exactly_nothing(layout, dtype):
    """Also where products and sums are contracted to multiply-adds, as the emulation's compiler does it."""
    student, _ = pyramids(SHAPES["packs of channels"], dtype, layout, shift=3)
    assert not any(result.any() for result in emulated(student, [level.detach().clone() for level in student]))


def test_misaligned_starts():
    """Views that begin anywhere in a 16-byte pack, the two sides at different places."""
    for first, second in [(1, 1), (2, 3), (0, 1)]:
        flat = [torch.randn(2 * 4 * 5 * 7 + 8)[start : start + 280] for start in (first, second)]
        for layout in (torch.contiguous_format, torch.channels_last):
            views = [one.as_strided((2, 4, 5, 7), torch.empty(2, 4, 5, 7, memory_format=layout).stride(), start)
                     for one, start in zip(flat, (first, second))]  # fmt: skip
            check([[view.requires_grad_()] for view in views])


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_hard_rows(layout):
    """Large means, constant rows, nearly equal sides."""
    student, teacher = pyramids([(2, 8, 9, 40)], torch.float32, layout, layout, shift=1000)
    student[0].data[0] = 0.1
    teacher[0].data[1] = student[0].data[1] * (1 + 1e-5)
    check([student, teacher])


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_same_bits_in_every_schedule(layout):
    sides = pyramids(PYRAMID, torch.float32, layout, layout)
    results = [emulated(*sides, seed=seed, poison=poison) for seed in simt.SEEDS for poison in (0xFF, 0x7F)]
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


def test_gradient_for_one_side():
    sides = pyramids(PYRAMID)
    both = emulated(*sides)[1:]
    levels = [[level.detach() for level in side] for side in sides]
    loss, moments = simt.run("instance_norm_mse", *levels, 1e-5)
    for wanted, expected in (((True, False), both[:4]), ((False, True), both[4:])):
        found = simt.run("instance_norm_mse_backward", torch.ones_like(loss), *levels, moments, *wanted)
        assert len(found) == 4 and all(torch.equal(one, other) for one, other in zip(found, expected))
