"""The CUDA source of value_mimic, run by the emulation, against the reference."""

import pytest
import simt
import torch
from kernels import DTYPES, channels_last, contiguous, strided
from tolerance import assert_no_worse

from fastkd.ops import value_mimic_reference

SHAPES = {  # images, heads, depth, sizes
    "pyramid": (2, 3, 4, [(9, 11), (4, 4), (1, 3), (1, 1)]),
    "published depth": (1, 2, 32, [(5, 29), (2, 3)]),  # more cells than a tile
    "whole packs": (1, 2, 32, [(8, 20), (4, 4)]),  # of cells and of channels
    "one channel a head": (1, 5, 1, [(3, 4)]),
    "empty": (0, 2, 4, [(4, 4)]),
    "no cells": (2, 2, 4, [(4, 4), (0, 3)]),
}


def draw(images, heads, depth, sizes, dtype=torch.float32, layout=contiguous, other=None):
    student, teacher = (
        [one((torch.randn(images, heads * depth, *size) * 2 + 0.5).to(dtype)) for size in sizes]
        for one in (layout, other or layout)
    )
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    mass = [torch.rand(images, heads, *size).to(sums) for size in sizes]
    for level in mass:
        level[..., :1] = 0  # cells nobody looks at
    return [level.requires_grad_() for level in student], teacher, mass


def emulated(student, teacher, mass, **settings):
    """Loss and the student's gradients."""
    levels = [[level.detach() for level in side] for side in (student, teacher, mass)]
    loss, total = simt.run("value_mimic", *levels, 1e-5, **settings)
    grad = torch.linspace(-1, 1, loss.numel()).to(loss).view(loss.shape)
    return [loss, *simt.run("value_mimic_backward", grad, *levels, total, 1e-5, **settings)]


def reference(student, teacher, mass):
    loss = value_mimic_reference(student, teacher, mass)
    grad = torch.linspace(-1, 1, loss.numel()).to(loss).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, student, grad)]


def check(arguments, **settings):
    exact = reference(*([level.detach().double().requires_grad_() for level in side] for side in arguments))
    actual = emulated(*arguments, **settings)
    assert_no_worse(actual, reference(*arguments), exact)
    return actual


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_no_worse_than_plain(shape, layout, dtype):
    check(draw(*shape, dtype, layout))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("starts", [(1, 1), (3, 0), (4, 8)], ids=str)
def test_misaligned_starts(starts, layout):
    """Views that begin anywhere in a 16-byte pack."""
    stride = torch.empty(2, 8, 4, 8, memory_format=layout).stride()
    views = [torch.randn(520).as_strided((2, 8, 4, 8), stride, start) for start in starts]
    check([[views[0].requires_grad_()], [views[1]], [torch.rand(2, 2, 4, 8)]])


@pytest.mark.parametrize("layouts", [(contiguous, channels_last), (channels_last, contiguous), (strided, contiguous)])
def test_mixed_layouts(layouts):
    check(draw(*SHAPES["pyramid"], torch.float32, *layouts))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_float64(layout):
    arguments = draw(*SHAPES["pyramid"], torch.float64, layout)
    torch.testing.assert_close(emulated(*arguments), reference(*arguments), rtol=1e-11, atol=1e-14)


def test_same_bits_in_every_schedule():
    arguments = draw(*SHAPES["pyramid"])
    results = [emulated(*arguments, seed=seed, poison=poison) for seed in simt.SEEDS for poison in (0xFF, 0x7F)]
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_equal_values_give_exactly_nothing(layout, dtype):
    student, _, mass = draw(*SHAPES["published depth"], dtype, layout)
    assert not any(result.any() for result in emulated(student, [level.detach().clone() for level in student], mass))


@pytest.mark.parametrize("card, depth", [("sm_86", 94), ("sm_80", 128), ("sm_90", 128)])
def test_deep_heads(card, depth):
    """The deepest that the smallest card takes in float32; the published 32 are far below."""
    check(draw(1, 1, depth, [(2, 3)]), shared_bytes=simt.SHARED_LIMITS[card])
    if card == "sm_86":
        with pytest.raises(RuntimeError, match=r"value_mimic: a head of 95 channels needs .*; use more heads"):
            emulated(*draw(1, 1, depth + 1, [(2, 3)]), shared_bytes=simt.SHARED_LIMITS[card])


def test_a_head_too_deep_for_shared_memory_is_a_clear_error():
    with pytest.raises(RuntimeError, match=r"value_mimic: a head of 32 channels needs .*; use more heads or the ref"):
        emulated(*draw(*SHAPES["published depth"]), shared_bytes=1024)
