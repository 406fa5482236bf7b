"""FGFI against a transcription of methods.md section 3 in plain loops."""

import pytest
import torch
from ragged import LEVELS, assert_close_gradients, gradients, part_of, ragged_batch, ragged_pyramid
from torch.nn import functional as F

from fastkd.distillers import FGFI

ANCHORS = [
    torch.tensor([[-s, -s, s, s], [-1.4 * s, -0.7 * s, 1.4 * s, 0.7 * s], [-0.5 * s, -s, 0.5 * s, s]])
    for s in (6.0, 12.0, 24.0, 48.0)
]


def iou(first, second):
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def imitating_cells(batch, anchors, psi, levels=LEVELS):
    """{(image, level, y, x)} by loops over boxes, levels, cells and anchors."""
    cells = set()
    for box, image in zip(batch.boxes.tolist(), batch.image_index.tolist(), strict=True):
        best = {}
        for level, (rows, columns) in enumerate(levels):
            down, right = batch.padded_size[0] // rows, batch.padded_size[1] // columns
            for y in range(rows):
                for x in range(columns):
                    moved = [
                        (x1 + x * right, y1 + y * down, x2 + x * right, y2 + y * down)
                        for x1, y1, x2, y2 in anchors[level].tolist()
                    ]
                    best[level, y, x] = max(iou(box, anchor) for anchor in moved)
        threshold = psi * max(best.values())
        cells |= {(image, *cell) for cell, value in best.items() if value > threshold}
    return cells


def transcription(module, student, teacher, batch, anchors):
    """The loss, cell by cell."""
    cells = imitating_cells(batch, anchors, module.psi)
    adapted = [F.conv2d(level, module.adapter.weight, module.adapter.bias, padding=1).clamp(min=0) for level in student]
    total = adapted[0].sum() * 0
    for image, level, y, x in cells:
        total = total + ((adapted[level][image, :, y, x] - teacher[level][image, :, y, x]) ** 2).sum()
    return module.weight / (2 * max(len(cells), 1)) * total


def module_for_test(channels=5, **options):
    """An FGFI module with weights much larger than at initialisation, so that the adapter matters."""
    module = FGFI(ANCHORS, channels, **options).double()
    torch.nn.init.normal_(module.adapter.weight, std=0.3)
    torch.nn.init.normal_(module.adapter.bias, std=0.3)
    return module


@pytest.mark.parametrize("counts", [(3, 0, 2), (1,), (0, 0), (7, 1)], ids=str)
@pytest.mark.parametrize("teacher_channels", [None, 8])
def test_equals_transcription(counts, teacher_channels):
    module = module_for_test(teacher_channels=teacher_channels, weight=0.3)
    batch = ragged_batch(counts)
    student = ragged_pyramid(len(counts), 5)
    teacher = ragged_pyramid(len(counts), teacher_channels or 5, seed=1)
    loss = module(student, batch, teacher).losses["fgfi_imitation"]
    expected = transcription(module, student, teacher, batch, ANCHORS)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert (loss > 0) == (sum(counts) > 0)
    actual = gradients(loss, module, student)
    assert_close_gradients(actual, gradients(expected, module, student), tolerance=1e-10)
    assert all(value is not None for value in actual.values())
    assert gradients(loss_of(module, student, teacher, batch), module, teacher)["input0"] is None


def loss_of(module, student, teacher, batch, **options):
    return module(student, batch, teacher, **options).losses["fgfi_imitation"]


@pytest.mark.parametrize("psi", [0.0, 0.5, 0.9, 1.0])
def test_mask_is_the_strictly_better_cells(psi):
    batch = ragged_batch((4, 0, 3), seed=3)
    module = FGFI(ANCHORS, 5, psi=psi)
    masks = module.masks(ragged_pyramid(3, 5), batch)
    found = {(image, level, y, x) for level, mask in enumerate(masks) for image, y, x in mask.nonzero().tolist()}
    assert found == imitating_cells(batch, ANCHORS, psi)
    assert (not found) == (psi == 1.0)  # nothing exceeds the best one itself


def test_threshold_is_global_over_levels():
    """A box equal to an anchor of the third level: cells of other levels with IoU up to psi are excluded."""
    batch = ragged_batch((1,))
    batch.boxes = torch.tensor([[8.0, 8.0, 56.0, 56.0]])
    module = FGFI([anchors[:1] for anchors in ANCHORS], 5)
    masks = module.masks(ragged_pyramid(1, 5), batch)
    assert masks[2][0].any() and not masks[0][0].any()  # the finest anchor's IoU with it is 144 / 2304


def test_anchors_outside_the_image_count():
    batch = ragged_batch((1,))
    batch.boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    anchors = [torch.tensor([[-10.0, -10.0, 10.0, 10.0]])] * 4
    masks = FGFI(anchors, 5, psi=0.9).masks(ragged_pyramid(1, 5), batch)
    assert masks[0][0, 0, 0] and masks[3][0, 0, 0]


def test_split_batch_averages_to_the_whole(monkeypatch):
    """Two halves with the mean of their counts as normaliser, gradients averaged = the whole batch."""
    module = module_for_test()
    batch = ragged_batch((4, 1, 0, 0))
    student, teacher = ragged_pyramid(4, 5), ragged_pyramid(4, 5, seed=1)
    whole = gradients(loss_of(module, student, teacher, batch), module)
    halves = [range(0, 2), range(2, 4)]
    counts = []
    monkeypatch.setattr("fastkd.distillers.fgfi.global_mean", lambda count: counts.append(count) or count)
    parts = [
        (
            [level[h.start : h.stop] for level in student],
            [level[h.start : h.stop] for level in teacher],
            part_of(batch, h),
        )
        for h in halves
    ]
    for part in parts:
        loss_of(module, *part)
    assert counts[0] > 0 and counts[1] == 0
    monkeypatch.setattr("fastkd.distillers.fgfi.global_mean", lambda count: sum(counts) / 2)
    found = [gradients(loss_of(module, *part), module) for part in parts]
    assert_close_gradients({name: (found[0][name] + found[1][name]) / 2 for name in whole}, whole, tolerance=1e-10)


def test_weight_and_start():
    module = FGFI(ANCHORS, 16, teacher_channels=24)
    assert module.adapter.weight.abs().max() <= 2e-4 and 0.7e-4 < module.adapter.weight.std() < 1.0e-4
    assert not module.adapter.bias.any()
    batch, student = ragged_batch((2, 3)), ragged_pyramid(2, 16, dtype=torch.float32)
    teacher = ragged_pyramid(2, 24, seed=1, dtype=torch.float32)
    full = loss_of(module, student, teacher, batch)
    module.weight /= 4
    torch.testing.assert_close(loss_of(module, student, teacher, batch), full / 4)
    assert set(module.state_dict()) == {"adapter.weight", "adapter.bias"}


def test_a_detached_student_gets_no_gradient():
    module, batch = module_for_test(), ragged_batch((2, 3))
    student, teacher = ragged_pyramid(2, 5), ragged_pyramid(2, 5, seed=1)
    loss = loss_of(module, student, teacher, batch, detach_student=True)
    torch.testing.assert_close(loss, loss_of(module, student, teacher, batch))
    found = gradients(loss, module, student)
    assert {name for name, value in found.items() if value is not None} == {"adapter.weight", "adapter.bias"}


def test_autocast_loss_is_float32_and_close():
    torch.manual_seed(0)
    module = module_for_test(16).float()
    batch, student = ragged_batch((2, 3)), ragged_pyramid(2, 16, dtype=torch.float32)
    teacher = ragged_pyramid(2, 16, seed=1, dtype=torch.float32)
    plain = loss_of(module, student, teacher, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_of(module, student, [level.bfloat16() for level in teacher], batch)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=0.02, atol=0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="psi must be in"):
        FGFI(ANCHORS, 8, psi=1.5)
    with pytest.raises(ValueError, match="weight must be"):
        FGFI(ANCHORS, 8, weight=-1)
    module, batch = FGFI(ANCHORS, 8), ragged_batch((1, 1))
    student, teacher = ragged_pyramid(2, 8, dtype=torch.float32), ragged_pyramid(2, 9, dtype=torch.float32)
    with pytest.raises(ValueError, match="teacher must have 8 channels, got 9"):
        loss_of(module, student, teacher, batch)
    with pytest.raises(ValueError, match="images and cells"):
        loss_of(module, student, student[:3], batch)
    with pytest.raises(ValueError, match="one entry a level"):
        FGFI(ANCHORS[:2], 8)(student, batch, student)
    with pytest.raises(ValueError, match="FGFI: teacher must be given, got None; pass the frozen teacher's pyramid"):
        module(student, batch)
    with pytest.raises(ValueError, match=r"FGFI: anchors must be a list of \[A, 4\] tensors"):
        FGFI([], 8)
