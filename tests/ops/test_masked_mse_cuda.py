"""The CUDA source of masked_mse, run by the emulation, against the reference."""

import pytest
import simt
import torch
from kernels import DTYPES, channels_last, contiguous, strided
from tolerance import assert_no_worse

from fastkd.ops import masked_mse_reference

PYRAMID = [(9, 11), (4, 4), (1, 3), (1, 1), (0, 3)]
SHAPES = {  # images, channels, sizes
    "pyramid": (2, 5, PYRAMID),
    "tiles of cells": (1, 3, [(13, 41)]),  # two tiles of columns, or 17 of rows
    "tiles of channels": (1, 520, [(3, 3)]),
    "packs": (1, 64, [(4, 10), (2, 2)]),
    "one channel": (3, 1, [(5, 7)]),
    "empty": (0, 5, [(4, 4), (2, 2)]),
    "no channels": (2, 0, [(4, 4)]),
}


def draw(images, channels, sizes, dtype=torch.float32, layout=contiguous, other=None, share=0.3):
    """Student (leaves), teacher, masks with about this share of the cells."""
    student, teacher = (
        [one(torch.randn(images, channels, *size).to(dtype)) for size in sizes] for one in (layout, other or layout)
    )
    masks = [torch.rand(images, *size) < share for size in sizes]
    return [level.requires_grad_() for level in student], teacher, masks


def emulated(student, teacher, masks, **settings):
    """Error, count and the student's gradients."""
    levels = [[level.detach() for level in side] for side in (student, teacher)]
    error, count = simt.run("masked_mse", *levels, masks, **settings)
    return [error, count, *simt.run("masked_mse_backward", error.new_tensor(0.75), *levels, masks, **settings)]


def reference(student, teacher, masks):
    error, count = masked_mse_reference(student, teacher, masks)
    return [error.detach(), count, *torch.autograd.grad(error, student, error.new_tensor(0.75))]


def check(arguments, **settings):
    student, masks = arguments[0], arguments[2]
    exact = reference(*([level.detach().double().requires_grad_() for level in side] for side in arguments[:2]), masks)
    actual = emulated(*arguments, **settings)
    assert_no_worse(actual, reference(*arguments), exact)
    for ours, level in zip(actual[2:], student):
        assert ours.stride() == level.stride() or not level.is_contiguous(memory_format=torch.channels_last)
    return actual


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_no_worse_than_plain(shape, layout, dtype):
    check(draw(*shape, dtype, layout))


@pytest.mark.parametrize("share", [-1.0, 0.02, 2.0])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_none_few_and_all_cells(layout, share):
    check(draw(2, 12, [(9, 12), (3, 3)], torch.float32, layout, share=share))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_float64(layout):
    arguments = draw(*SHAPES["pyramid"], torch.float64, layout)
    torch.testing.assert_close(emulated(*arguments), reference(*arguments), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layouts", [(contiguous, channels_last), (channels_last, contiguous), (strided, contiguous)])
def test_mixed_layouts(layouts):
    check(draw(*SHAPES["pyramid"], torch.float32, *layouts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("starts", [(1, 1), (2, 3), (0, 1), (8, 4)])
def test_misaligned_starts(starts, dtype):
    """Views that begin anywhere in a 16-byte pack, the two sides at different places."""
    shape = (2, 4, 5, 7)
    for layout in (torch.contiguous_format, torch.channels_last):
        stride = torch.empty(shape, memory_format=layout).stride()
        student, teacher = (torch.randn(288).to(dtype).as_strided(shape, stride, start) for start in starts)
        check([[student.requires_grad_()], [teacher], [torch.rand(2, 5, 7) < 0.5]])


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("columns", [7, 8])
def test_index_at_its_limit(columns, layout):
    """The narrow index of the emulation has 15 bits: one more element than it reaches takes the wide one."""
    numel = 64 * 64 * columns  # 2^15 is the first that does not fit
    assert (numel > 2**15 - 1) == (columns == 8)
    check(draw(1, 64, [(64, columns)], torch.bfloat16, layout, share=0.05))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_what_is_outside_the_mask_does_not_matter(layout):
    student, teacher, masks = draw(2, 8, [(6, 8)], torch.float32, layout)
    expected = emulated(student, teacher, masks)
    outside = ~masks[0][:, None].expand_as(student[0])
    hostile = [
        [layout(torch.where(outside, bad, level[0].detach()))]
        for bad, level in ((torch.inf, student), (torch.nan, teacher))
    ]
    found = emulated(*hostile, masks)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_same_bits_in_every_schedule(layout):
    arguments = draw(1, 33, [(5, 7), (2, 3)], torch.float32, layout)
    results = [emulated(*arguments, seed=seed, poison=poison) for seed in simt.SEEDS for poison in (0xFF, 0x7F)]
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


def test_bad_arguments():
    student, teacher, masks = ([level.detach() for level in side] for side in draw(*SHAPES["pyramid"]))
    for bad in (
        (student, teacher[:-1], masks),
        (student, teacher, [mask.float() for mask in masks]),
        (student, [level.double() for level in teacher], masks),
        (student * 4, teacher * 4, masks * 4),
    ):
        with pytest.raises(RuntimeError, match="masked_mse: "):
            simt.run("masked_mse", *bad)
    with pytest.raises(RuntimeError, match="masked_mse_backward: grad must be one number"):
        simt.run("masked_mse_backward", torch.ones(2), student, teacher, masks)
