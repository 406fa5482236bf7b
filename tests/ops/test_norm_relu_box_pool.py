"""norm_relu_box_pool: the kernel of every instruction set against the reference, in values, gradients and refusals."""

import pytest
import torch
from kernels import (
    DTYPES,
    LAYOUTS,
    channels_last,
    check,
    close_to_float64,
    contiguous,
    double,
    expanded,
    results_and_gradients,
    same_bits,
    strided,
)
from torch.nn import functional as F

from fastkd.ops import box_pool_reference, norm_relu_box_pool, norm_relu_box_pool_reference

SIZE = (64, 96)
SIZES = [(16, 24), (19, 37), (4, 6), (2, 3), (1, 1)]  # rows longer and shorter than a vector, not multiples of one


def boxes_of(count, images, size=SIZE):
    """Boxes of all sizes, some beyond the image, some without cells, and the image of each."""
    scale = torch.tensor([size[1], size[0]])
    centre, side = torch.rand(count, 2) * scale, torch.rand(count, 2) ** 2 * scale
    return torch.cat([centre - side / 2, centre + side / 2], 1), torch.randint(0, max(images, 1), (count,))


def arguments(channels=5, dtype=torch.float32, layout=contiguous, count=11, images=3, sizes=SIZES, make=torch.randn):
    levels = [layout(make((images, channels, *size)).to(dtype)).requires_grad_() for size in sizes]
    return levels, *boxes_of(count, images), SIZE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 70])  # part of a vector; whole blocks of channels, vectors and single ones
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_no_worse_than_plain(capability, layout, channels, dtype):
    check(norm_relu_box_pool, norm_relu_box_pool_reference, arguments(channels, dtype, layout))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_more_than_a_thousand_objects_in_an_image(capability, layout):
    call = arguments(19, layout=layout, count=2300, images=2, sizes=[(16, 24), (3, 5)])
    check(norm_relu_box_pool, norm_relu_box_pool_reference, call)
    same_bits(norm_relu_box_pool, call, (1, 3))


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_levels_beyond_the_caches(capability, layout, dtype):
    """Gradients of a mebibyte and more take paths of their own; rows of 59 columns begin anywhere in a line."""
    call = arguments(64, dtype, layout, images=2, sizes=[(72, 59)])
    check(norm_relu_box_pool, norm_relu_box_pool_reference, call)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_float64(capability, layout):
    close_to_float64(norm_relu_box_pool, norm_relu_box_pool_reference, arguments(13, layout=layout))


@pytest.mark.parametrize("layout", [*LAYOUTS[2:], expanded])
def test_other_layouts(layout):
    check(norm_relu_box_pool, norm_relu_box_pool_reference, arguments(layout=layout))


def shifted(shape):
    return torch.randn(shape) * 1e-2 + 100


def tiny(shape):
    return torch.randn(shape) * 1e-4


def ramp(shape):
    return torch.linspace(-1000, 1000, shape[2] * shape[3]).view(1, 1, *shape[2:]).expand(shape) + torch.randn(shape)


@pytest.mark.sampled
@pytest.mark.parametrize("make", [shifted, tiny, ramp])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_hard_values(capability, layout, make):
    """A large mean, a tiny variance: the result is float64's to float32's precision, whatever plain torch gives."""
    call = arguments(layout=layout, make=make, sizes=[*SIZES[:4], (60, 70)])
    found = results_and_gradients(norm_relu_box_pool, call)
    truth = results_and_gradients(norm_relu_box_pool_reference, double(call))
    for ours, exact in zip(found[0] + found[1], truth[0] + truth[1]):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=4e-6 * float(exact.abs().max()))


def test_constant_images_are_exactly_nothing(capability):
    call = arguments(make=lambda shape: torch.full(shape, 0.1))
    (pooled,), gradients = results_and_gradients(norm_relu_box_pool, call)
    assert not pooled.any() and not any(gradient.any() for gradient in gradients)


def test_reference_is_the_formula():
    levels, *where = arguments(dtype=torch.float64)
    normalised = []
    for level in levels:
        flat = level.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + 0.1).sqrt()
        normalised.append(F.relu(flat.reshape(level.shape)))
    found = norm_relu_box_pool_reference(levels, *where, 0.1)
    torch.testing.assert_close(found, box_pool_reference(normalised, *where))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_without_boxes_and_cells(capability, layout):
    check(norm_relu_box_pool, norm_relu_box_pool_reference, arguments(count=0, layout=layout))
    for images, channels, sizes in [(0, 3, SIZES), (2, 0, SIZES), (2, 3, [(4, 5), (0, 3), (3, 0)])]:
        call = arguments(channels, layout=layout, count=4 if images else 0, images=images, sizes=sizes)
        close_to_float64(norm_relu_box_pool, norm_relu_box_pool_reference, call)


def test_nan_stays_in_its_image_and_level(capability):
    for bad in (float("nan"), float("inf")):
        levels, _, _, size = arguments()
        levels[0].data[1, 2, 3, 4] = bad
        boxes, index = torch.tensor([[0.0, 0, 95, 63]]).repeat(3, 1), torch.arange(3)
        (pooled,), gradients = results_and_gradients(norm_relu_box_pool, (levels, boxes, index, size))
        assert pooled[0, 1].isnan().all() and gradients[0][1].isnan().all()
        assert pooled[1:].isfinite().all() and pooled[0, ::2].isfinite().all()
        assert gradients[0][::2].isfinite().all() and gradients[1].isfinite().all()


@pytest.mark.sampled
@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("layout", [contiguous, channels_last, strided])
def test_gradcheck(capability, layout, eps):
    levels, *where = arguments(3, torch.float64, layout, 5, 2, [(4, 6), (2, 3)])
    assert torch.autograd.gradcheck(lambda *levels: norm_relu_box_pool(levels, *where, eps), levels)


def test_gradcheck_of_expanded_levels():
    levels, *where = arguments(3, torch.float64, contiguous, 5, 1, [(4, 6), (2, 3)])

    def op(*levels):
        return norm_relu_box_pool([level.expand(2, -1, -1, -1) for level in levels], *where)

    assert torch.autograd.gradcheck(op, levels)


def test_gradient_of_one_level_only():
    call = arguments()
    expected = torch.autograd.grad(norm_relu_box_pool(*call).sum(), call[0][1])[0]
    mixed = [level if index == 1 else level.detach() for index, level in enumerate(call[0])]
    found = torch.autograd.grad(norm_relu_box_pool(mixed, *call[1:]).sum(), mixed[1])[0]
    assert torch.equal(found, expected)
    assert not norm_relu_box_pool([level.detach() for level in mixed], *call[1:]).requires_grad


def test_autocast_keeps_the_levels_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        call = arguments(dtype=dtype)
        expected = norm_relu_box_pool(*call)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(norm_relu_box_pool(*call), expected)
            assert norm_relu_box_pool(*call).dtype == norm_relu_box_pool_reference(*call).dtype == dtype


def draw(choose):
    images, dtype = choose.randint(1, 3), choose.choice(DTYPES)
    layout = choose.choice([*LAYOUTS, expanded])
    sizes = [(choose.randint(1, 7), choose.randint(1, 19)) for _ in range(choose.randint(1, 3))]
    channels, count = choose.choice([1, 2, 5, 17]), choose.randint(0, 6)
    return arguments(channels, dtype, layout, count, images, sizes)


LEVEL, BOXES, INDEX = torch.zeros(1, 2, 3, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"levels": LEVEL}, TypeError, "levels must be a list"),
    ({"levels": [LEVEL.to(torch.float8_e5m2)]}, ValueError, "levels must be float32, float64, bfloat16 or float16"),
    ({"boxes": BOXES[:, :3]}, ValueError, r"boxes must be \[K, 4\], got \[2, 3\]"),
    ({"boxes": BOXES / 0}, ValueError, "boxes must be finite, got NaN or infinity"),
    ({"image_index": INDEX + 1}, ValueError, r"image_index must be in \[0, 1\), got 1"),
    ({"image_size": (3, 0)}, ValueError, "image_size must be two positive ints"),
    ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
    ({"eps": float("nan")}, ValueError, "eps must be finite and not negative, got nan"),
])  # fmt: skip
def test_bad_arguments(changes, error, message):
    call = {"levels": [LEVEL], "boxes": BOXES, "image_index": INDEX, "image_size": (9, 9), "eps": 1e-5}
    with pytest.raises(error, match=f"^norm_relu_box_pool: {message}.*; "):
        norm_relu_box_pool(**(call | changes))
