"""The CUDA source of norm_relu_box_pool, run by the emulation, against the reference."""

import pytest
import simt
import torch
from kernels import DTYPES, channels_last, contiguous, double, results_and_gradients, strided
from test_norm_relu_box_pool import SIZE, boxes_of, ramp, shifted, tiny
from tolerance import assert_no_worse

from fastkd.ops import norm_relu_box_pool_reference

PYRAMID = [(9, 11), (4, 4), (1, 3), (1, 1)]
SHAPES = {  # images, channels, sizes, boxes
    "pyramid": (2, 5, PYRAMID, 4),
    "strips and tiles": (1, 4, [(30, 28)], 4),
    "packs": (2, 40, [(4, 15), (2, 2)], 5),
    "groups of channels": (1, 272, [(2, 3)], 2),
    "wide": (1, 2, [(1, 530)], 3),
    "no boxes": (2, 5, PYRAMID, 0),
}


def arguments(images, channels, sizes, count, dtype=torch.float32, layout=contiguous, make=torch.randn):
    levels = [layout(make((images, channels, *size)).to(dtype)).requires_grad_() for size in sizes]
    return levels, *boxes_of(count, images), SIZE


def emulated(levels, boxes, image_index, size, **settings):
    """Results and gradients, as results_and_gradients gives them, and what forward keeps."""
    levels = [level.detach() for level in levels]
    out, kept, normal = simt.run("norm_relu_box_pool", levels, boxes, image_index, *size, 1e-5, **settings)
    grad = torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(0)) / 8
    backward = grad.to(out), levels, boxes, image_index, *size, kept, normal
    return [out, *simt.run("norm_relu_box_pool_backward", *backward, **settings)], (kept, normal)


def plain(call):
    results, gradients = results_and_gradients(norm_relu_box_pool_reference, call)
    return [*results, *gradients]


def check(call, **settings):
    found, _ = emulated(*call, **settings)
    assert_no_worse(found, plain(call), plain(double(call)))


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_no_worse_than_plain(shape, layout, dtype):
    check(arguments(*shape, dtype, layout))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_float64(layout):
    call = double(arguments(*SHAPES["pyramid"], torch.float64, layout))
    torch.testing.assert_close(emulated(*call)[0], plain(call), rtol=1e-10, atol=1e-13)


def test_other_and_mixed_layouts():
    sizes = [(5, 7), (4, 4), (2, 3)]
    check(arguments(2, 5, sizes[:2], 3, torch.float32, strided))
    levels, *where = arguments(2, 8, sizes, 3)
    layouts = contiguous, channels_last, contiguous
    check(([layout(level.detach()).requires_grad_() for layout, level in zip(layouts, levels)], *where))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("make", [shifted, tiny, ramp])
def test_hard_values(make, layout):
    """A large mean, a tiny variance: the result is float64's to float32's precision, whatever plain torch gives."""
    call = arguments(1, 3, [(20, 30), (4, 6)], 4, torch.float32, layout, make)
    for ours, exact in zip(emulated(*call)[0], plain(double(call)), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=4e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_constant_images_are_exactly_nothing(layout):
    call = arguments(1, 3, [(50, 40), (3, 3)], 4, layout=layout, make=lambda shape: torch.full(shape, 0.1))
    found, (kept, normal) = emulated(*call)
    assert not any(one.any() for one in [*found, kept]) and normal[0].eq(call[0][0].flatten()[0]).all()


@pytest.mark.parametrize("start", [1, 3, 8])
def test_misaligned_starts(start):
    """Views that begin anywhere in a 16-byte pack."""
    shape = (2, 4, 3, 7)
    for layout in (torch.contiguous_format, torch.channels_last):
        stride = torch.empty(shape, memory_format=layout).stride()
        for dtype in (torch.float32, torch.bfloat16):
            view = torch.randn(176).to(dtype).as_strided(shape, stride, start).requires_grad_()
            check(([view], *boxes_of(2, 2), SIZE))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("columns", [31, 32])
def test_index_at_its_limit(columns, layout):
    """The narrow index of the emulation has 15 bits: one more element than it reaches takes the wide one."""
    assert (64 * 16 * columns > 2**15 - 1) == (columns == 32)
    check(arguments(1, 64, [(16, columns)], 2, torch.bfloat16, layout))


@pytest.mark.parametrize(("layout", "count"), [(contiguous, 300), (channels_last, 530)])
def test_more_boxes_than_a_list_holds(layout, count):
    """Of one image and tile; and more than the block that sorts them has threads."""
    levels, boxes, index, size = arguments(2, 2, [(3, 4)], count, layout=layout)
    index[: count - 20] = 0
    boxes[index == 0] = torch.tensor([0.0, 0.0, size[1], size[0]])
    boxes[:2] = boxes[-2:] = torch.tensor([30.0, 20.0, 70.0, 60.0])
    check((levels, boxes, index, size))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_same_bits_in_every_schedule(layout):
    call = arguments(2, 8, [(5, 7), (2, 3)], 3, layout=layout)
    results = [emulated(*call, seed=seed, poison=poison) for seed in simt.SEEDS for poison in (0xFF, 0x7F)]
    for other in results[1:]:
        for ours, theirs in zip(other, results[0]):
            assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_empty():
    """No images, no channels, levels without cells."""
    for images, channels, sizes in ((0, 4, PYRAMID), (2, 0, PYRAMID), (2, 4, [(0, 3), (4, 4), (3, 0)])):
        levels, boxes, index, size = arguments(images, channels, sizes, 3 if images else 0)
        found, _ = emulated(levels, boxes, index, size)
        assert found[0].shape == (len(sizes), len(boxes), channels)
        if images and channels:
            assert_no_worse(found, plain((levels, boxes, index, size)), plain(double((levels, boxes, index, size))))


def test_any_value_is_safe():
    """Objects of no image give 0 and take nothing; boxes that are not finite touch no foreign memory."""
    levels, boxes, index, size = arguments(2, 3, [(5, 7)], 6)
    wrong = index.clone()
    wrong[::2] = torch.tensor([-1, 2, -(2**63)])
    (out, *gradients), _ = emulated(levels, boxes, wrong, size)
    (expected, *_), _ = emulated(levels, boxes[1::2], index[1::2], size)
    assert not out[:, ::2].any() and torch.equal(out[:, 1::2], expected)
    assert all(gradient.isfinite().all() for gradient in gradients)
    for bad in (torch.nan, torch.inf, -torch.inf, 1e38):
        hostile = boxes.clone()
        hostile[:2, 0], hostile[1:3, 3] = bad, bad
        emulated(levels, hostile, index, size)


def test_bad_arguments():
    levels, boxes, index, size = arguments(*SHAPES["pyramid"])
    levels = [level.detach() for level in levels]
    for bad in (
        ([], boxes, index, *size),
        (levels * 5, boxes, index, *size),
        ([levels[0], levels[1].double()], boxes, index, *size),
        (levels, boxes[:, :3], index, *size),
        (levels, boxes, index[1:], *size),
        (levels, boxes, index, 0, 5),
    ):
        with pytest.raises(RuntimeError, match="norm_relu_box_pool: "):
            simt.run("norm_relu_box_pool", *bad, 1e-5)
    out, kept, normal = simt.run("norm_relu_box_pool", levels, boxes, index, *size, 1e-5)
    for bad in ((out[1:], kept, normal), (out, kept.double(), normal), (out, kept, normal[:1])):
        with pytest.raises(RuntimeError, match="norm_relu_box_pool_backward: "):
            simt.run("norm_relu_box_pool_backward", bad[0], levels, boxes, index, *size, *bad[1:])
