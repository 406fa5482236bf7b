"""With kernels, no tensor of size queries x cells or boxes x cells is allocated, forward or backward.

The shape makes such a tensor stand out: its smallest form, one byte for each box and cell of the largest level, is
larger than every pyramid, weight and table of the call. Without kernels the references run, which allocate such
tensors; this also shows that the test detects them.
"""

import sys

import pytest
import torch
from distiller_cases import CHANNELS, build, inputs, losses
from torch.utils._pytree import tree_leaves

from benchmarks.memory import measure
from fastkd import ops

LEVELS = ((128, 192), (64, 96), (32, 48), (16, 24))
COUNTS = (150, 150)
BOXES = sum(COUNTS)
FORBIDDEN = BOXES * LEVELS[0][0] * LEVELS[0][1]  # 7.4 MB: boxes x cells as flags; queries x cells: 150 x 4 bytes a cell
LIMIT = 6_000_000
# ICD's gradients of column biases are summed for each of a bounded number of parts of the image: a quarter of what
# queries x cells would take as floats.
CELLS = sum(rows * columns for rows, columns in LEVELS)
LIMITS = {"icd": BOXES * CELLS * 4 // 4}
CPU = torch.device("cpu")
MODULES = {"lgd": "fastkd.distillers.lgd", "icd": "fastkd.distillers.icd", "fgfi": "fastkd.distillers.fgfi"}
# what each distiller calls, and where; the references of the others have no such tensor
QUADRATIC = {
    "norm_relu_box_pool": ("lgd", "fastkd.distillers.lgd"),
    "box_paint_conv3x3": ("lgd", "fastkd.distillers.lgd"),
    "instance_attention": ("icd", "fastkd.distillers.decoder"),
    "attention_mass": ("icd", "fastkd.distillers.decoder"),
    "imitation_mask": ("fgfi", "fastkd.distillers.fgfi"),
}


def largest_allocation(name):
    """Bytes of the largest allocation of forward and backward."""
    student, teacher, batch = inputs(COUNTS, levels=LEVELS, size=(256, 384))
    batch.masks = None
    module = build(name)
    if name == "icd":
        module.rho = 0  # 150 queries an image
    wanted = [*student, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

    def step():
        total = sum(losses(name, module, student, teacher, batch).values())
        return torch.autograd.grad(total, wanted, allow_unused=True)

    return measure(step, CPU).largest


def test_the_shape_makes_forbidden_tensors_stand_out():
    student, _, batch = inputs(COUNTS, levels=LEVELS, size=(256, 384))
    assert len(batch.boxes) == BOXES and FORBIDDEN > 1.2 * LIMIT
    usual = [*student, *(p for name in MODULES for p in build(name).parameters())]
    assert max(value.numel() * value.element_size() for value in usual) < LIMIT


@pytest.mark.parametrize("name", MODULES)
def test_nothing_grows_with_boxes_times_cells(name):
    assert largest_allocation(name) < LIMITS.get(name, LIMIT)


@pytest.mark.parametrize("op", QUADRATIC)
def test_an_op_that_does_is_noticed(op, monkeypatch):
    name, module = QUADRATIC[op]
    monkeypatch.setattr(sys.modules[module], op, getattr(ops, f"{op}_reference"))
    assert largest_allocation(name) > LIMITS.get(name, LIMIT)


def mask_call(op):
    """A call of a mask op, and the input of its gradient."""
    student, _, batch = inputs(COUNTS, levels=LEVELS, size=(256, 384))
    if op.startswith("mask_pool"):
        return lambda: getattr(ops, op)(student, batch.masks, batch.image_index), student
    embeddings = torch.randn(len(LEVELS), BOXES, CHANNELS, requires_grad=True)
    return lambda: getattr(ops, op)(embeddings, batch.masks, batch.image_index, len(COUNTS), LEVELS), [embeddings]


def largest_mask_allocation(op):
    call, wanted = mask_call(op)

    def step():
        results = tree_leaves(call())
        return torch.autograd.grad(results, wanted, [torch.ones_like(result) for result in results])

    return measure(step, CPU).largest


@pytest.mark.parametrize("op", ["mask_pool", "mask_paint"])
def test_mask_ops_allocate_nothing_of_that_size(op):
    assert largest_mask_allocation(op) < LIMIT


@pytest.mark.parametrize("op", ["mask_pool_reference", "mask_paint_reference"])
def test_mask_ops_that_do_are_noticed(op):
    assert largest_mask_allocation(op) > LIMIT
