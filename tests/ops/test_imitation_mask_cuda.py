"""The CUDA source of imitation_mask, run by the emulation: the same booleans as the reference."""

import random

import pytest
import simt
import torch
from test_imitation_mask import anchors_of, boxes_of

from fastkd.ops import imitation_mask_reference

STRIDES = [(8, 8), (16, 16), (32, 40)]
SIZES = [(19, 37), (10, 19), (5, 4)]
IMAGE = (150, 296)


def emulated(boxes, image_index, anchors, strides, batch_size, level_sizes, psi, **settings):
    flat = [[side for pair in pairs for side in pair] for pairs in (strides, level_sizes)]
    return simt.run("imitation_mask", boxes, image_index, anchors, flat[0], batch_size, flat[1], psi, **settings)


def check(call, **settings):
    found, expected = emulated(*call, **settings), imitation_mask_reference(*call)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    return found


def arguments(count=6, images=2, per_cell=3, psi=0.5, dtype=torch.float32):
    boxes, index = boxes_of(count, IMAGE).to(dtype), torch.randint(0, images, (count,))
    return boxes, index, [anchors_of(per_cell, s[0]).to(dtype) for s in STRIDES], STRIDES, images, SIZES, psi


@pytest.mark.parametrize("psi", [0.0, 0.5, 1.0])
def test_equals_the_reference(psi):
    assert any(mask.any() for mask in check(arguments(psi=psi))) == (psi < 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    check(arguments(dtype=dtype))


def test_more_boxes_than_threads():
    boxes, index, anchors, *_ = arguments(count=300, images=3, per_cell=1)
    check((boxes, index, anchors[:1], [(8, 8)], 3, [(9, 5)], 0.5))


def test_random_calls():
    choose = random.Random(0)
    for seed in range(12):
        torch.manual_seed(seed)
        strides = [(choose.choice([1, 4, 8, 13]), choose.choice([1, 4, 8, 13])) for _ in range(choose.randint(1, 3))]
        sizes = [(choose.randint(1, 9), choose.randint(1, 40)) for _ in strides]
        anchors = [anchors_of(choose.randint(1, 3), stride[0]) for stride in strides]
        count, images = choose.choice([0, 1, 2, 5]), choose.randint(1, 3)
        boxes = boxes_of(count, (60, 150)) if seed % 3 else torch.randint(-9, 99, (count, 4)).float()
        psi = choose.choice([0.0, 0.3, 0.5, 0.99])
        check((boxes, torch.randint(0, images, (count,)), anchors, strides, images, sizes, psi), seed=seed)


def test_regular_anchors_and_ties():
    """Equal anchors and boxes on the grid: many IoUs are equal, and those equal to the threshold do not count."""
    anchors = [torch.tensor([[-8.0, -8.0, 8.0, 8.0], [-16.0, -8.0, 16.0, 8.0]])]
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0], [8.0, 8.0, 24.0, 24.0], [4.0, 4.0, 20.0, 20.0]])
    for psi in (0.25, 0.5, 1 / 3, 1.0):
        check((boxes, torch.tensor([0, 1, 2]), anchors, [(8, 8)], 3, [(6, 40)], psi))


def test_nothing_to_mark():
    """No boxes, no images, no cells, boxes without area or far away."""
    boxes, index, *rest = arguments()
    assert not any(mask.any() for mask in emulated(boxes[:0], index[:0], *rest))
    assert [list(mask.shape) for mask in emulated(boxes[:0], index[:0], *rest[:2], 0, *rest[3:])] == [
        [0, *size] for size in SIZES
    ]
    found = emulated(boxes, index, *rest[:3], [(0, 5), (4, 0), (3, 3)], 0.5)
    assert [list(mask.shape) for mask in found] == [[2, 0, 5], [2, 4, 0], [2, 3, 3]]
    far = torch.tensor([[5000.0, 5000.0, 5100.0, 5100.0], [50.0, 50.0, 50.0, 50.0], [90.0, 90.0, 20.0, 20.0]])
    assert not any(mask.any() for mask in check((far, index[:3], *rest)))


def test_same_in_every_schedule():
    call = arguments(count=4, per_cell=2)
    results = [emulated(*call, seed=seed, poison=poison) for seed in simt.SEEDS for poison in (0xFF, 0x7F)]
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


def test_any_value_is_safe():
    """Indices of no image are left out; boxes and anchors that are not finite or huge touch no foreign memory."""
    boxes, index, *rest = arguments()
    wrong = index.clone()
    wrong[::2] = torch.tensor([-1, 2, 2**62])
    found, expected = emulated(boxes, wrong, *rest), imitation_mask_reference(boxes[1::2], index[1::2], *rest)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    boxes, index, *rest = arguments(count=3, per_cell=1)
    for bad in (torch.nan, torch.inf, -torch.inf, 1e38, -1e38):
        hostile = boxes.clone()
        hostile[:2, 0], hostile[1:3, 3] = bad, bad
        emulated(hostile, index, *rest)
        emulated(boxes, index, [torch.where(base > 0, bad, base) for base in rest[0]], *rest[1:])


def test_bad_arguments():
    boxes, index, anchors, strides, images, sizes, psi = arguments()
    call = {"boxes": boxes, "index": index, "anchors": anchors, "strides": strides, "images": images, "sizes": sizes}
    for changes in (
        {"boxes": boxes[:, :3]},
        {"index": index[1:]},
        {"index": index.int()},
        {"strides": [(0, 8)] * 3},
        {"strides": strides[1:]},
        {"images": -1},
        {"sizes": [(2**20, 2**20)] * 3},
        {"anchors": []},
    ):
        with pytest.raises(RuntimeError, match="imitation_mask: "):
            emulated(*(call | changes).values(), psi)
