"""Each figure of the methods' diagnostics against a direct computation in loops (methods 9)."""

import math

import pytest
import torch
from icd_transcription import CHANNELS, HEADS, TEACHER
from imitation_cases import pyramids
from ragged import LEVELS, SIZE, priors, ragged_batch, ragged_pyramid

from fastkd.distillers import CWD, FGFI, ICD, LGD, PKD, ScoreL2
from fastkd.distillers.diagnostics import cell_overlap, share_inside_boxes

COUNTS = [(3, 0, 2), (0, 0), (1,)]
ANCHORS = [torch.tensor([[-s, -s, s, s], [-s, -2 * s, s, 2 * s]]) for s in (4.0, 8.0, 16.0, 32.0)]


def overlap_of_cell(box, y, x, size):
    """Share of the area of cell (y, x) of a level of `size` cells inside one box."""
    height, width = SIZE[0] / size[0], SIZE[1] / size[1]
    rows = max(0.0, min(box[3], (y + 1) * height) - max(box[1], y * height))
    columns = max(0.0, min(box[2], (x + 1) * width) - max(box[0], x * width))
    return rows * columns / (height * width)


def cells(size):
    return [(y, x) for y in range(size[0]) for x in range(size[1])]


def ratio(pair):
    total, number = (float(value.detach()) for value in pair)
    return total / number


def as_numbers(figures):
    assert all(value.ndim == 0 and not value.requires_grad for pair in figures.values() for value in pair)
    return {name: (float(a), float(b)) for name, (a, b) in figures.items()}


@pytest.mark.parametrize("size", LEVELS, ids=str)
def test_overlap_counts_pixels(size):
    """With corners on whole pixels the share is a count of pixels."""
    boxes = torch.tensor([[3, 5, 40, 21], [0, 0, 96, 64], [90, 60, 96, 64], [17, 9, 18, 10]])
    found = cell_overlap(boxes.float(), SIZE, size)
    inside = torch.zeros(len(boxes), *SIZE)
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        inside[k, y1:y2, x1:x2] = 1
    expected = inside.unflatten(1, (size[0], -1)).unflatten(3, (size[1], -1)).mean((2, 4))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_share_inside_boxes(counts):
    batch = ragged_batch(counts)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(len(counts), *size, generator=generator) for size in LEVELS]
    inside = total = covered = number = 0.0
    for level, size in zip(weights, LEVELS):
        for image in range(len(counts)):
            boxes = batch.boxes[batch.image_index == image].tolist()
            height, width = batch.image_sizes[image].tolist()
            for y, x in cells(size):
                cover = max((overlap_of_cell(box, y, x, size) for box in boxes), default=0.0)
                inside, total = inside + float(level[image, y, x]) * cover, total + float(level[image, y, x])
                covered += cover
                number += overlap_of_cell((0, 0, width, height), y, x, size)
    found = as_numbers(share_inside_boxes(weights, batch))
    assert found["inside_boxes"] == pytest.approx((inside, total), rel=1e-4)
    assert found["inside_if_even"] == pytest.approx((covered, number), rel=1e-4)


def imitators():
    """The methods that imitate a whole pyramid, with other channels for the teacher."""
    torch.manual_seed(0)
    return {
        "pkd": PKD(8, teacher_channels=12),
        "cwd": CWD(8, teacher_channels=12, tau=2.0),
        "fgfi": FGFI(ANCHORS, 8, teacher_channels=12),
        "scorel2": ScoreL2(8, teacher_channels=12, levels=4),
    }


def pkd_error(module, student, teacher, batch):
    """1 - correlation, up to Bessel's correction: half the mean squared distance of the standardised features."""
    errors = []
    for level, target in zip(student, teacher):
        one, two = (x.transpose(0, 1).flatten(1) for x in (module.adapter(level), target))  # [C, B * S]
        freedom = max(1, one.shape[1] - 1)
        one, two = ((x - x.mean(1, keepdim=True)) for x in (one, two))
        one, two = (x / ((x.square().sum(1, keepdim=True) / freedom).sqrt() + 1e-6) for x in (one, two))
        errors.append((one - two).square().mean() / 2)
    return sum(errors) / len(errors)


def cwd_error(module, student, teacher, batch):
    error = uniform = 0.0
    for level, target in zip(student, teacher):
        p = (target / module.tau).flatten(2).softmax(2)
        q = (module.adapter(level) / module.tau).flatten(2).softmax(2)
        factor = module.tau**2 / (p.shape[0] * p.shape[1])
        error = error + factor * (p * (p / q).log()).sum()
        uniform = uniform + factor * (p * (p * p.shape[2]).log()).sum()
    return error / uniform


def fgfi_error(module, student, teacher, batch):
    error = size = 0.0
    for level, target, mask in zip(student, teacher, module.masks(student, batch)):
        adapted = module.adapter(level).relu()
        for image, y, x in mask.nonzero().tolist():
            error = error + (adapted[image, :, y, x] - target[image, :, y, x]).square().sum()
            size = size + target[image, :, y, x].square().sum()
    return error / size


def scorel2_error(module, student, teacher, batch):
    error = size = 0.0
    for adapter, level, target in zip(module.adapters, student, teacher):
        score = target[:, :1].sigmoid()
        error = error + (score * (adapter(level) - target).square()).sum()
        size = size + (score * target.square()).sum()
    return error / size


ERRORS = {"pkd": pkd_error, "cwd": cwd_error, "fgfi": fgfi_error, "scorel2": scorel2_error}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("counts", [(3, 0, 2), (1,)], ids=str)
def test_imitation_error(name, counts):
    module, batch = imitators()[name], ragged_batch(counts)
    student, teacher = pyramids(len(counts), 8, 12, torch.float32)
    student = [level.detach() for level in student]
    options = {"scores": [level[:, :1].sigmoid() for level in teacher]} if module.needs_scores else {}
    with torch.no_grad():
        found = module.diagnostics(student, batch, teacher, **options)
        expected = ERRORS[name](module, student, teacher, batch)
    assert ratio(found["imitation_error"]) == pytest.approx(float(expected), rel=1e-4)
    weights = {"fgfi": lambda: module.masks(student, batch), "scorel2": lambda: [s[:, 0] for s in options["scores"]]}
    if name in weights:
        expected = as_numbers(share_inside_boxes(weights[name](), batch))
        assert {key: value for key, value in as_numbers(found).items() if key in expected} == expected


def test_scale_of_the_imitation_error():
    """0 for a student that equals the teacher, 1 for one that knows nothing of it."""
    batch = ragged_batch((2, 1))
    _, teacher = pyramids(2, 8, 8, torch.float32)
    fgfi = FGFI(ANCHORS, 8)  # its adapter begins near zero
    positive = [level.abs() for level in teacher]
    assert ratio(fgfi.diagnostics(positive, batch, positive)["imitation_error"]) == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        fgfi.adapter.weight.copy_(torch.eye(8)[:, :, None, None] * torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]))
    assert ratio(fgfi.diagnostics(positive, batch, positive)["imitation_error"]) < 1e-10
    for module in (PKD(8), CWD(8)):
        assert ratio(module.diagnostics(teacher, batch, teacher)["imitation_error"]) == pytest.approx(0, abs=1e-6)
    constant = [torch.ones_like(level) for level in teacher]
    assert ratio(CWD(8).diagnostics(constant, batch, teacher)["imitation_error"]) == pytest.approx(1, abs=1e-5)


def icd(**options):
    torch.manual_seed(1)
    return ICD(3, priors(3), CHANNELS, teacher_channels=TEACHER, heads=HEADS, rho=2, **options).double()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("counts", [(2, 0, 1), (12, 9), (0, 0)], ids=str)
def test_icd(counts, layers):
    """Of more than eight instances, every n-th is measured."""
    module, batch = icd(layers=layers, weight=3.0), ragged_batch(counts)
    student, teacher = ragged_pyramid(len(counts), CHANNELS), ragged_pyramid(len(counts), TEACHER, seed=1)
    found = as_numbers(module.diagnostics(student, batch, teacher))
    assert found.keys() == {"imitation_error", "inside_boxes", "inside_if_even"}
    total = sum(counts)
    if total == 0:
        assert all(number == 0 for _, number in found.values())
        return
    # The loss is the mean over all images and heads, and those without boxes give 0.
    images, with_boxes = len(counts), sum(count > 0 for count in counts)
    loss = float(module(student, batch, teacher).losses["icd_distill"].detach())
    error = found["imitation_error"][0] / found["imitation_error"][1]
    assert error == pytest.approx(loss / 3.0 / 2 * images / with_boxes, rel=1e-5)
    maps = module.attention(teacher, batch)
    inside = area = 0.0
    rows = list(range(0, total, max(1, math.ceil(total / 8))))
    assert len(rows) <= 8 and found["inside_boxes"][1] == found["inside_if_even"][1] == len(rows)
    for k in rows:
        box = batch.boxes[k].tolist()
        for level, size in zip(maps, LEVELS):
            inside += sum(float(level[k, :, y, x].mean()) * overlap_of_cell(box, y, x, size) for y, x in cells(size))
        height, width = batch.image_sizes[batch.image_index[k]].tolist()
        area += (box[2] - box[0]) * (box[3] - box[1]) / (height * width)
    assert found["inside_boxes"][0] == pytest.approx(inside, rel=1e-5)
    assert found["inside_if_even"][0] == pytest.approx(area, rel=1e-5)


def test_icd_of_equal_values():
    """A student whose values are the teacher's has no error; one with the opposite values has 2."""
    torch.manual_seed(0)
    module, batch = ICD(3, priors(3), CHANNELS, heads=HEADS), ragged_batch((2, 0, 1))
    teacher = [level.float().detach() for level in ragged_pyramid(3, CHANNELS)]
    assert ratio(module.diagnostics(teacher, batch, teacher)["imitation_error"]) == pytest.approx(0, abs=1e-6)
    opposite = [-level for level in teacher]  # the projections begin without bias
    assert ratio(module.diagnostics(opposite, batch, teacher)["imitation_error"]) == pytest.approx(2, abs=1e-3)


def test_only_lgd_instructs():
    student, _ = pyramids(2, 8, 8, torch.float32)
    batch, lgd = ragged_batch((2, 0)), LGD(3, 8, heads=2)
    assert lgd.instructs and lgd.diagnostics(student, batch) == {}
    torch.testing.assert_close(lgd.instruct(student, batch), lgd(student, batch).instructive)
    assert not PKD(8).instructs
    with pytest.raises(NotImplementedError, match=r"PKD\.instruct must be implemented"):
        PKD(8).instruct(student, batch)
