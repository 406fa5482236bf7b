"""box_paint_conv3x3: the kernel of every instruction set against the reference, in values, gradients and refusals."""

import pytest
import torch
from kernels import (
    DTYPES,
    channels_last,
    check,
    close_to_float64,
    contiguous,
    opcheck,
    same_bits,
    strided,
)
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from fastkd.ops import box_paint_conv3x3, box_paint_conv3x3_reference
from fastkd.ops.box_paint_conv3x3 import Taps, multiply_taps

SIZE = (64, 96)
SIZES = [(16, 24), (19, 37), (4, 6), (2, 3), (1, 1)]
TAPS, TAPS_BACKWARD = torch.ops.fastkd.conv3x3_taps, torch.ops.fastkd.conv3x3_taps_backward


def boxes_of(count, images, size=SIZE):
    """Boxes of all sizes: of one row or column, of two, beyond the image, without cells; and the image of each."""
    scale = torch.tensor([size[1], size[0]])
    centre, side = torch.rand(count, 2) * scale, torch.rand(count, 2) ** 2 * scale
    side[::3] = torch.rand(side[::3].shape) * 12
    return torch.cat([centre - side / 2, centre + side / 2], 1), torch.randint(0, max(images, 1), (count,))


def arguments(channels=(5, 6), dtype=torch.float32, count=14, images=3, sizes=SIZES, bias=True, layout=contiguous):
    inputs, outputs = channels
    embeddings = torch.randn(len(sizes), count, inputs).to(dtype).requires_grad_()
    weight = layout(torch.randn(outputs, inputs, 3, 3).to(dtype)).requires_grad_()
    bias = torch.randn(outputs).to(dtype).requires_grad_() if bias else None
    return embeddings, weight, bias, *boxes_of(count, images), SIZE, images, sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(5, 6), (3, 83)])  # part of a vector; whole blocks, vectors and single ones
def test_no_worse_than_plain(capability, channels, dtype):
    check(box_paint_conv3x3, box_paint_conv3x3_reference, arguments(channels, dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_levels_beyond_the_caches(capability, dtype):
    """Results of a mebibyte and more take a path of their own."""
    call = arguments((5, 64), dtype, images=2, sizes=[(72, 59)])
    check(box_paint_conv3x3, box_paint_conv3x3_reference, call)


@pytest.mark.parametrize("sizes", [[(16, 24), (3, 5)], [(3, 5)], [(1, 2)]], ids=str)
def test_more_than_a_thousand_objects_in_an_image(capability, sizes):
    call = arguments((3, 19), count=2300, images=2, sizes=sizes)
    check(box_paint_conv3x3, box_paint_conv3x3_reference, call)
    close_to_float64(box_paint_conv3x3, box_paint_conv3x3_reference, call)
    same_bits(box_paint_conv3x3, call, (1, 3))


@pytest.mark.sampled
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [contiguous, channels_last, strided])
def test_float64(capability, layout, bias):
    call = arguments((3, 13), bias=bias, layout=layout)
    close_to_float64(box_paint_conv3x3, box_paint_conv3x3_reference, call)


@pytest.mark.sampled
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_thin_boxes_everywhere(rows, columns):
    """Boxes of few cells inside the level, at its sides and corners, and as large as the level."""
    for height, width in [(7, 8), (rows, columns), (rows + 1, columns + 1)]:
        places = [(y, x) for y in {0, 1, height - rows} for x in {0, 2, width - columns} if x + columns <= width]
        boxes = torch.tensor([[x, y, x + columns - 1, y + rows - 1] for y, x in places]).double()
        index = torch.arange(len(places)) % 2
        weight, embeddings = torch.randn(4, 3, 3, 3).double(), torch.randn(1, len(places), 3).double()
        call = (embeddings.requires_grad_(), weight, None, boxes, index, (height, width), 2, [(height, width)])
        close_to_float64(box_paint_conv3x3, box_paint_conv3x3_reference, call)


def test_the_result_is_channels_last():
    for level in box_paint_conv3x3(*arguments()):
        assert level.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last, strided])
def test_gradients_in_every_layout(capability, layout, dtype):
    call = arguments((3, 83), dtype)
    levels = box_paint_conv3x3(*call)
    grads = [layout(torch.randn(level.shape).to(dtype)) for level in levels]
    exact = [value.detach().double().requires_grad_() for value in call[:3]]
    truth = torch.autograd.grad(box_paint_conv3x3_reference(*exact, *call[3:]), exact, [g.double() for g in grads])
    for found, true in zip(torch.autograd.grad(levels, call[:3], grads), truth):
        assert found.dtype == dtype
        error = float((found.double() - true).abs().max() / true.abs().max())
        assert error <= max(torch.finfo(dtype).eps, 4e-6)


def test_reference_is_the_convolution_of_painted_boxes():
    embeddings, weight, bias, boxes, index, size, images, sizes = arguments(dtype=torch.float64)
    found = box_paint_conv3x3_reference(embeddings, weight, bias, boxes, index, size, images, sizes)
    for number, (rows, columns) in enumerate(sizes):
        painted = torch.zeros(images, 5, rows, columns, dtype=torch.float64)
        for box, image, embedding in zip(boxes, index, embeddings[number]):
            x1, y1, x2, y2 = (
                float(corner.clamp(0, side - 1) * cells / side)
                for corner, side, cells in zip(box, (size[1], size[0]) * 2, (columns, rows) * 2)
            )
            inside = [[y1 <= y <= y2 and x1 <= x <= x2 for x in range(columns)] for y in range(rows)]
            painted[image] += embedding.detach()[:, None, None] * torch.tensor(inside)
        torch.testing.assert_close(found[number], F.conv2d(painted, weight, bias, padding=1))


def test_without_boxes_images_and_levels(capability):
    check(box_paint_conv3x3, box_paint_conv3x3_reference, arguments(count=0))
    levels = box_paint_conv3x3(*arguments(count=0, images=0))
    assert [tuple(level.shape) for level in levels] == [(0, 6, *size) for size in SIZES]
    assert box_paint_conv3x3(*arguments(sizes=[])) == []
    levels = box_paint_conv3x3(*arguments((5, 0)))
    assert [tuple(level.shape) for level in levels] == [(3, 0, *size) for size in SIZES]


def test_gradient_of_one_level_only():
    call = arguments()
    (grad,) = torch.autograd.grad(box_paint_conv3x3(*call)[1].sum(), call[0])
    assert grad[1].any() and not grad[0].any() and not grad[2:].any()
    frozen = [value.detach() for value in call[:3]]
    assert not box_paint_conv3x3(*frozen, *call[3:])[0].requires_grad
    bias = frozen[2].clone().requires_grad_()
    torch.autograd.grad(sum(level.sum() for level in box_paint_conv3x3(*frozen[:2], bias, *call[3:])), bias)


def test_gradcheck(capability):
    call = arguments((2, 3), torch.float64, 6, 2, [(4, 6), (2, 3)])

    def op(*values):
        return tuple(box_paint_conv3x3(*values, *call[3:]))

    assert torch.autograd.gradcheck(op, call[:3])
    embeddings, weight, bias = (value.detach() for value in call[:3])
    narrow = [weight[:, :1].clone().requires_grad_(), bias[:1].clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda w, b: op(strided(embeddings), w.expand(-1, 2, -1, -1), b.expand(3)), narrow)


@pytest.mark.sampled
@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize(("count", "inputs", "outputs"), [
    (1, 1, 1), (5, 7, 3), (17, 48, 16), (70, 33, 40), (64, 160, 32), (67, 160, 9), (0, 4, 4), (3, 0, 2), (3, 2, 0),
    (190, 17, 21), (600, 17, 21), (600, 0, 3), (600, 3, 0),
])  # fmt: skip
def test_products_no_worse_than_plain(capability, levels, count, inputs, outputs):
    """Of embeddings and of outputs whole vectors, tiles of them, parts and none; and so many that torch multiplies."""
    call = torch.randn(levels, count, inputs).requires_grad_(), torch.randn(outputs, inputs, 3, 3).requires_grad_()
    check(multiply_taps, Taps.apply, call)
    close_to_float64(multiply_taps, Taps.apply, call)
    same_bits(multiply_taps, call)


@pytest.mark.parametrize("count", [9, 300])
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_products_of_which_one_gradient_is_wanted(capability, wanted, count):
    embeddings, weight = torch.randn(2, count, 5), torch.randn(19, 5, 3, 3)
    embeddings.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])
    check(multiply_taps, Taps.apply, (embeddings, weight))


def test_one_graph_for_few_and_many_products():
    """The kernel or torch's product is chosen where the graph runs: no guard, and the eager call's bits."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(multiply_taps, fullgraph=True, backend=counter, dynamic=True)
    weight = torch.randn(5, 4, 3, 3)
    for count in (11, 100, 256, 257, 400):
        embeddings = torch.randn(2, count, 4)
        assert torch.equal(compiled(embeddings, weight), multiply_taps(embeddings, weight))
    assert counter.frame_count == 1


def test_autocast_does_not_round_the_gradients_of_many_products():
    call = torch.randn(2, 300, 5).requires_grad_(), torch.randn(7, 5, 3, 3).requires_grad_()
    cotangent = torch.randn(2, 300, 9, 7)
    expected = torch.autograd.grad(multiply_taps(*call), call, cotangent)
    found = multiply_taps(*call)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(found, call, cotangent)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected))


@pytest.mark.parametrize("count", [5, 600])
def test_opcheck_of_the_products(count):
    for dtype in (torch.float32, torch.float64):
        call = [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in [(count, 3), (4, 3, 3, 3)]]
        opcheck(TAPS.default, tuple(call))
        grad = torch.randn(count, 9, 4, dtype=dtype)
        for wanted in [(True, True), (True, False), (False, True)]:
            opcheck(TAPS_BACKWARD.default, (grad, *(value.detach() for value in call), *wanted))


def test_autocast_gives_its_dtype_and_full_precision():
    call = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = box_paint_conv3x3(*call), box_paint_conv3x3_reference(*call)
        mixed = box_paint_conv3x3(call[0].detach().bfloat16(), *call[1:])
    exact = box_paint_conv3x3(*call)
    for ours, theirs, other, true in zip(found, plain, mixed, exact):
        assert ours.dtype == theirs.dtype == other.dtype == torch.bfloat16
        assert torch.equal(ours, true.bfloat16())
    gradients = torch.autograd.grad(sum(level.float().sum() for level in found), call[:3])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    with pytest.raises(ValueError, match=r"weight must be torch.float32 .*, got torch.bfloat16; .* autocast"):
        box_paint_conv3x3(call[0], call[1].bfloat16(), *call[2:])


def draw(choose, channels=((1, 1), (2, 3), (3, 17))):
    images, dtype = choose.randint(1, 3), choose.choice(DTYPES)
    sizes = [(choose.randint(1, 6), choose.randint(1, 8)) for _ in range(choose.randint(1, 2))]
    channels = choose.choice(channels)
    layout = choose.choice([contiguous, channels_last, strided])
    return arguments(channels, dtype, choose.randint(0, 5), images, sizes, choose.random() < 0.7, layout)


BOXES, INDEX = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"embeddings": torch.zeros(1, 3, 4)}, ValueError, r"embeddings must be \[1, 2, C\]"),
    ({"embeddings": torch.zeros(1, 2, 4).to(torch.float8_e5m2)}, ValueError, "embeddings must be float32, float64"),
    ({"weight": torch.zeros(4, 3, 3, 3)}, ValueError, r"weight must be \[C_out, 4, 3, 3\], got \[4, 3, 3, 3\]"),
    ({"weight": torch.zeros(4, 4, 3, 3, device="meta")}, ValueError, "weight must be on cpu as embeddings, got meta"),
    ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[4\] as the weight's outputs, got \[3\]"),
    ({"bias": torch.zeros(4).half()}, ValueError, "bias must be torch.float32 as embeddings, got torch.float16"),
    ({"boxes": BOXES / 0}, ValueError, "boxes must be finite, got NaN or infinity"),
    ({"image_index": INDEX - 1}, ValueError, r"image_index must be in \[0, 1\), got -1"),
    ({"batch_size": -1}, ValueError, "batch_size must be an int >= 0, got -1"),
    ({"level_sizes": 3}, TypeError, "level_sizes must be a list"),
    ({"level_sizes": [(0, 3)]}, ValueError, "level_sizes must be two positive ints"),
])  # fmt: skip
def test_bad_arguments(changes, error, message):
    call = {"embeddings": torch.zeros(1, 2, 4), "weight": torch.zeros(4, 4, 3, 3), "bias": None, "boxes": BOXES,
            "image_index": INDEX, "image_size": (9, 9), "batch_size": 1, "level_sizes": [(3, 3)]}  # fmt: skip
    with pytest.raises(error, match=f"^box_paint_conv3x3: {message}.*; "):
        box_paint_conv3x3(**(call | changes))
