"""The CUDA source of box_paint_conv3x3, run by the emulation, against the convolution of painted boxes."""

import pytest
import simt
import torch
from kernels import DTYPES, channels_last, contiguous, convert, strided
from test_box_paint_conv3x3 import arguments
from tolerance import assert_no_worse

from fastkd.ops import box_paint_conv3x3_reference
from fastkd.ops.box_paint_conv3x3 import multiply_taps

SIZES = [(9, 61), (4, 6), (2, 3), (1, 1)]  # two strips, three tiles; parts of one; a single cell


def sides(sizes):
    return [side for size in sizes for side in size]


def forward(call, **settings):
    """Levels [B, C, H_l, W_l] of the raw op."""
    embeddings, weight, bias, boxes, index, size, images, sizes = call
    taps = multiply_taps(embeddings, weight).detach()
    bias = None if bias is None else bias.detach().to(taps.dtype)
    arguments = (taps, bias, boxes, index, *size, images, sides(sizes), embeddings.detach())
    return [level.permute(0, 3, 1, 2) for level in simt.run("box_paint_conv3x3", *arguments, **settings)]


def gradients(call, grads, **settings):
    """Of embeddings, weight and bias, from the raw op's of taps and bias."""
    embeddings, weight, bias, boxes, index, size, _, _ = call
    cells = [grad.permute(0, 2, 3, 1) for grad in grads]
    taps, of_bias = simt.run("box_paint_conv3x3_backward", cells, boxes, index, *size, **settings)
    found = torch.autograd.grad(multiply_taps(embeddings, weight), [embeddings, weight], taps)
    return [*found, *([] if bias is None else [of_bias.to(bias.dtype)])]


def reference(call, grads):
    levels = box_paint_conv3x3_reference(*call)
    leaves = [value for value in call[:3] if value is not None]
    return levels, torch.autograd.grad(levels, leaves, [grad.to(levels[0].dtype) for grad in grads])


def doubled(call):
    return *(None if value is None else convert([value], torch.float64)[0] for value in call[:3]), *call[3:]


def check(call, layout=contiguous, **settings):
    """Asserts that results follow the tolerance rule, and that gradients are as close to float64's as the CPU
    kernel's (tests/ops/test_box_paint_conv3x3.py): the matrix products behind them are torch's."""
    dtype, (*_, images, sizes) = call[0].dtype, call
    grads = [layout(torch.randn(images, call[1].shape[0], *size).to(dtype)) for size in sizes]
    levels, plain = reference(call, grads)
    exact, truth = reference(doubled(call), grads)
    actual = forward(call, **settings)
    assert_no_worse(actual, levels, exact)
    found = gradients(call, grads, **settings)
    for one, other, true in zip(found, plain, truth, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        scale = max(float(true.abs().max()), 1e-30) if true.numel() else 1.0
        error = float((one.double() - true).abs().max()) / scale if true.numel() else 0.0
        assert error <= max(torch.finfo(dtype).eps, 4e-6)
    return actual, found


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last, strided])
def test_no_worse_than_plain(layout, dtype):
    """Whole packs of channels, a second group that is not full; single channels."""
    check(arguments((3, 40), dtype, 9, 2, SIZES if layout == channels_last else SIZES[1:]), layout)
    if dtype == torch.float32:
        check(arguments((3, 5), dtype, 9, 2, SIZES[1:], bias=False), layout)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_float64(layout):
    call = doubled(arguments((3, 13), torch.float64, sizes=SIZES))
    grads = [layout(torch.randn(3, 13, *size).double()) for size in SIZES]
    levels, plain = reference(call, grads)
    torch.testing.assert_close(forward(call), levels, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradients(call, grads), list(plain), rtol=1e-11, atol=1e-12)


def test_thin_boxes_everywhere():
    """Boxes of few cells inside the level, at its sides and corners, and as large as the level."""
    for height, width in [(7, 8), (2, 3), (1, 4), (1, 1)]:
        rows, columns = ([(a, b) for a in range(n) for b in (a, a + 1, a + 2, n - 1) if b < n] for n in (height, width))
        boxes = torch.tensor([[x0, y0, x1, y1] for y0, y1 in rows for x0, x1 in columns]).double()[::3]
        index = torch.arange(len(boxes)) % 2
        weight, embeddings = torch.randn(4, 2, 3, 3).double(), torch.randn(1, len(boxes), 2).double()
        size = height, width
        call = (embeddings.requires_grad_(), weight.requires_grad_(), None, boxes, index, size, 2, [size])
        grads = [torch.randn(2, 4, *size).double()]
        levels, plain = reference(call, grads)
        torch.testing.assert_close(forward(call), levels, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(gradients(call, grads), list(plain), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("changes", [
    {"count": 0}, {"count": 0, "images": 0}, {"count": 1, "channels": (1, 1)}, {"sizes": [(1, 1)]},
])  # fmt: skip
def test_edges(changes):
    check(arguments(**({"count": 6, "sizes": SIZES[1:]} | changes)))


def test_without_levels_and_channels():
    assert forward(arguments(sizes=[])) == []
    levels = forward(arguments((5, 0), sizes=SIZES[:2]))
    assert [tuple(level.shape) for level in levels] == [(3, 0, *size) for size in SIZES[:2]]
    _, _, _, boxes, index, size, *_ = arguments()
    cells = [level.permute(0, 2, 3, 1) for level in levels]
    taps, bias = simt.run("box_paint_conv3x3_backward", cells, boxes, index, *size)
    assert taps.shape == (2, 14, 9, 0) and bias.shape == (0,)


@pytest.mark.parametrize("channels, rows, columns", [(7, 31, 151), (8, 64, 64)])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_index_types(layout, channels, rows, columns):
    """As many elements as the narrow index of the emulation has, and one more."""
    assert channels * rows * columns in (2**15 - 1, 2**15)
    check(arguments((2, channels), torch.float32, 2, 1, [(rows, columns)]), layout)


def test_misaligned_starts():
    """Views that begin anywhere in a 16-byte pack."""
    embeddings, weight, bias, *where = arguments((2, 8), torch.float32, 5, 2, [(5, 9)])
    for start in (1, 3):
        values = torch.cat([torch.zeros(start), bias.detach()])[start:].requires_grad_()
        check((embeddings, weight, values, *where), lambda x, start=start: misaligned(x, start))


def misaligned(level, start):
    """The same values, C fastest, from the element `start` of a tensor on."""
    cells = level.permute(0, 2, 3, 1).contiguous()
    flat = torch.cat([torch.zeros(start, dtype=level.dtype), cells.flatten()])
    return flat[start:].view(cells.shape).permute(0, 3, 1, 2)


@pytest.mark.parametrize("shared_bytes", [4096, 45000])
def test_more_objects_than_a_block_keeps(shared_bytes):
    """In shared memory: backward goes over its strip again, forward looks the others up for every cell."""
    call = arguments((2, 3), torch.float32, 40, 1, [(5, 7), (3, 40)])
    levels, _ = reference(call, [torch.zeros(1, 3, *size) for size in call[-1]])
    exact, _ = reference(doubled(call), [torch.zeros(1, 3, *size) for size in call[-1]])
    assert_no_worse(forward(call, shared_bytes=shared_bytes), levels, exact)
    if shared_bytes > 40000:
        check(call, shared_bytes=shared_bytes)
    else:
        with pytest.raises(RuntimeError, match=r"box_paint_conv3x3_backward: a block needs .* bytes of shared memory"):
            gradients(call, levels, shared_bytes=shared_bytes)


@pytest.mark.parametrize("shared_bytes", simt.SHARED_LIMITS.values(), ids=simt.SHARED_LIMITS.keys())
@pytest.mark.parametrize("count, dtype", [(6, torch.float32), (7, torch.float32), (8, torch.float32),
                                          (14, torch.float16), (15, torch.float16), (100, torch.bfloat16)])  # fmt: skip
def test_static_and_dynamic_shared_memory_together(count, dtype, shared_bytes):
    """7 and 15 boxes need at most 48 KB without the static arrays and more with them; 100 need several passes."""
    check(arguments((2, 3), dtype, count, 1, [(4, 6)]), shared_bytes=shared_bytes)


def test_same_bits_in_every_schedule():
    call = arguments((3, 5), count=6, images=2, sizes=SIZES[1:3])
    grads = [torch.randn(2, 5, *size) for size in SIZES[1:3]]
    runs = [
        forward(call, seed=seed, poison=poison) + gradients(call, grads, seed=seed, poison=poison)
        for seed in simt.SEEDS
        for poison in (0xFF, 0x7F)
    ]
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other))


@pytest.mark.parametrize("strange", [3, -1, 2**31, -(2**63)])
def test_images_that_are_not_there(strange):
    """Their boxes paint nothing and get no gradient."""
    embeddings, weight, bias, boxes, index, *rest = arguments(count=8, sizes=SIZES[1:])
    index = torch.where(torch.arange(8) % 3 == 0, strange, index)
    boxes[1], boxes[2, 2:] = float("nan"), float("inf")
    check((embeddings, weight, bias, boxes, index, *rest))


TAPS, BIAS, BOXES, INDEX = torch.zeros(1, 2, 9, 4), torch.zeros(4), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
BAD = [
    ((TAPS[:, :, :8], BIAS, BOXES, INDEX, 9, 9, 1, [3, 3], BIAS), r"taps must be \[L, K, 9, C\]"),
    ((TAPS, BIAS[:3], BOXES, INDEX, 9, 9, 1, [3, 3], BIAS), r"bias must be \[C\]"),
    ((TAPS, BIAS.double(), BOXES, INDEX, 9, 9, 1, [3, 3], BIAS), r"bias must be \[C\]"),
    ((TAPS, BIAS, BOXES, INDEX, 9, 9, 1, [3, 3], BIAS.double()), "taps must have the dtype in which"),
    ((TAPS, BIAS, BOXES, INDEX, 9, 9, -1, [3, 3], BIAS), "batch_size must not be negative, got -1"),
    ((TAPS, BIAS, BOXES, INDEX, 9, 0, 1, [3, 3], BIAS), "image_size must be two positive numbers"),
    ((TAPS, BIAS, BOXES, INDEX[:1], 9, 9, 1, [3, 3], BIAS), r"image_index must be \[K\] int64"),
]  # fmt: skip


@pytest.mark.parametrize("given, message", BAD, ids=[case[1][:30] for case in BAD])
def test_what_could_corrupt_memory_is_refused(given, message):
    with pytest.raises(RuntimeError, match=f"box_paint_conv3x3: .*{message}"):
        simt.run("box_paint_conv3x3", *given)


def test_gradients_must_agree():
    for grads in ([], [torch.zeros(1, 3, 3, 4), torch.zeros(1, 3, 3, 5)]):
        with pytest.raises(RuntimeError, match="box_paint_conv3x3_backward: grads must"):
            simt.run("box_paint_conv3x3_backward", grads, BOXES, INDEX, 9, 9)
