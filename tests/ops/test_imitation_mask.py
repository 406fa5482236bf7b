"""imitation_mask: the same booleans as the reference, with every instruction set (test_ops_reference: by hand)."""

import pytest
import torch
from draws import draws
from kernels import fuzz

from fastkd.ops import imitation_mask, imitation_mask_reference

STRIDES = [(8, 8), (16, 16), (32, 40)]
SIZES = [(25, 38), (13, 19), (7, 5)]
IMAGE = (200, 304)


def anchors_of(count, stride):
    """Random anchors around the origin, a few times the stride."""
    centre, size = (torch.rand(count, 2) - 0.5) * stride, stride * (0.5 + 6 * torch.rand(count, 2))
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


def boxes_of(count, image=IMAGE):
    low = (torch.rand(count, 2) * 1.2 - 0.1) * torch.tensor([image[1], image[0]])
    return torch.cat([low, low + torch.rand(count, 2).square() * 200], dim=1)


def arguments(count=12, images=2, per_cell=9, psi=0.5, dtype=torch.float32):
    boxes, index = boxes_of(count).to(dtype), torch.randint(0, images, (count,))
    return [boxes, index, [anchors_of(per_cell, s[0]).to(dtype) for s in STRIDES], STRIDES, images, SIZES, psi]


def raw_arguments(call):
    """The arguments that the public function passes to the raw op."""
    boxes, index, anchors, strides, images, sizes, psi = call
    return [
        boxes,
        index,
        anchors,
        [n for pair in strides for n in pair],
        images,
        [n for pair in sizes for n in pair],
        psi,
    ]


def draw(choose):
    levels, images, count = choose.randint(1, 3), choose.randint(1, 3), choose.choice([0, 1, 2, 7])
    strides = [(choose.choice([1, 4, 8, 13]), choose.choice([1, 4, 8, 13])) for _ in range(levels)]
    sizes = [(choose.randint(1, 9), choose.randint(1, 40)) for _ in range(levels)]
    anchors = [anchors_of(choose.randint(1, 4), stride[0]) for stride in strides]
    boxes = boxes_of(count, (60, 150)) if choose.random() < 0.7 else torch.randint(-9, 99, (count, 4)).float()
    psi = choose.choice([0.0, 0.3, 0.5, 0.99, 1.0])
    return [boxes, torch.randint(0, images, (count,)), anchors, strides, images, sizes, psi]


def test_equals_the_reference(capability):
    for psi in (0.0, 0.5, 1.0):
        call = arguments(psi=psi)
        found, expected = imitation_mask(*call), imitation_mask_reference(*call)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert any(mask.any() for mask in found) == (psi < 1)


def test_fuzz(capability):
    fuzz(imitation_mask, imitation_mask_reference, draw, count=draws(500))


def test_regular_anchors_and_ties(capability):
    """Equal anchors and boxes on the grid: many IoUs are equal, and those equal to the threshold do not count."""
    anchors = [torch.tensor([[-8.0, -8.0, 8.0, 8.0], [-16.0, -8.0, 16.0, 8.0]])]
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0], [8.0, 8.0, 24.0, 24.0], [4.0, 4.0, 20.0, 20.0]])
    index = torch.tensor([0, 1, 2])
    for psi in (0.25, 0.5, 1 / 3, 1.0):
        call = (boxes, index, anchors, [(8, 8)], 3, [(6, 40)], psi)
        assert torch.equal(imitation_mask(*call)[0], imitation_mask_reference(*call)[0])


def test_every_anchor_counts():
    """A box that fits one of many cells' anchors exactly: found wherever it lies, at the borders of the level too."""
    anchors = [torch.tensor([[-8.0, -4.0, 8.0, 4.0]])]
    for y, x in ((0, 0), (0, 39), (5, 17), (5, 39)):
        box = anchors[0] + torch.tensor([[8.0 * x, 8.0 * y, 8.0 * x, 8.0 * y]])
        mask = imitation_mask(box, torch.tensor([0]), anchors, [(8, 8)], 1, [(6, 40)], 0.99)[0]
        assert mask.nonzero().tolist() == [[0, y, x]]


def test_boxes_that_touch_nothing_mark_nothing(capability):
    far = torch.tensor([[5000.0, 5000.0, 5100.0, 5100.0], [50.0, 50.0, 50.0, 50.0], [90.0, 90.0, 20.0, 20.0]])
    call = (far, torch.zeros(3, dtype=torch.int64), *arguments()[2:4], 1, SIZES)
    assert not any(mask.any() for mask in imitation_mask(*call))
    assert not any(mask.any() for mask in imitation_mask_reference(*call))


@pytest.mark.parametrize("count, images", [(0, 2), (0, 0)])
def test_no_boxes(count, images):
    masks = imitation_mask(*arguments(count, 1)[:4], images, SIZES)
    assert [mask.shape for mask in masks] == [(images, *size) for size in SIZES]
    assert not any(mask.any() for mask in masks)


def test_other_dtypes_and_strides():
    """Boxes and anchors of any dtype and layout count as float32."""
    for dtype in (torch.float64, torch.bfloat16):
        call = arguments(dtype=dtype)
        call[0] = call[0].t().contiguous().t()
        expected = imitation_mask_reference(*call)
        assert all(torch.equal(one, other) for one, other in zip(imitation_mask(*call), expected))
    call[0].requires_grad_()
    assert not imitation_mask(*call)[0].requires_grad


BAD = [
    (ValueError, "image_index must be in", 1, torch.tensor([2])),
    (ValueError, "boxes must be finite", 0, torch.tensor([[0.0, 0.0, float("nan"), 1.0]])),
    (ValueError, "anchors, strides and level_sizes must have one entry", 2, []),
    (TypeError, "anchors must be a list", 2, torch.zeros(3, 1, 4)),
    (ValueError, r"anchors\[0\] must be \[A, 4\]", 2, [torch.zeros(0, 4)] * 3),
    (ValueError, r"anchors\[0\] must be finite", 2, [torch.full((1, 4), float("inf"))] * 3),
    (ValueError, r"anchors\[0\] must be on cpu", 2, [torch.zeros(1, 4, device="meta")] * 3),
    (ValueError, r"strides\[0\] must be two positive", 3, [(0, 8)] * 3),
    (ValueError, "batch_size must be an int", 4, -1),
    (ValueError, "psi must be in", 6, 2.0),
]


@pytest.mark.parametrize("error, message, place, value", BAD, ids=[case[1][:30] for case in BAD])
def test_bad_arguments(error, message, place, value):
    call = arguments(1)
    call[place] = value
    with pytest.raises(error, match=f"^imitation_mask: {message}"):
        imitation_mask(*call)
