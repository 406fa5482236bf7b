"""The dispatch ledger against counts by hand."""

import pytest
import torch
from distiller_cases import NAMES, build, inputs, losses
from torch import nn
from torch.nn import functional as F

from benchmarks.step import fastkd_costs
from benchmarks.step.dispatch_ledger import Counts, count, size_of
from fastkd import ops
from fastkd.ops._support import checks, library

KIB = 1024


def test_linear_forward_and_backward():
    x, weight = torch.randn(4, 5), torch.randn(3, 5, requires_grad=True)
    found = count(lambda: F.linear(x, weight).sum().backward())
    kernels = {
        name: number for name, number in found.by_op.items() if name in ("aten::mm", "aten::sum", "aten::ones_like")
    }
    assert kernels == {"aten::mm": 2, "aten::sum": 1, "aten::ones_like": 1} and found.ops - found.views == 4
    assert found.flops == 2 * (2 * 4 * 5 * 3)  # the product, and its weight's gradient
    product, loss = 4 * (20 + 15 + 12), 4 * (12 + 1)
    assert found.bytes == product + loss + 2 * 4 + 4 * (1 + 20 + 15)  # the expanded gradient is one number
    assert found.syncs == 0


def test_convolution_and_in_place_operators():
    conv, x = nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.randn(1, 2, 4, 4, requires_grad=True)

    def work():
        y = conv(x).relu_()
        y.backward(gradient)

    gradient = torch.randn(1, 3, 4, 4)
    found = count(work)
    product = 2 * 16 * 3 * 2 * 9
    assert found.flops == 3 * product  # forward, and gradients of input and weight
    out, image, weight = 4 * 48, 4 * 32, 4 * 54
    forward = image + weight + out + 2 * out  # relu_ reads and writes
    backward = 3 * out + (out + image + weight) + image + weight  # threshold_backward; three operands, two gradients
    assert found.bytes == forward + backward
    assert (
        found.by_op["aten::convolution"] == found.by_op["aten::convolution_backward"] == found.by_op["aten::relu_"] == 1
    )


def test_reads_and_writes_apart():
    a, b, index = torch.ones(256), torch.ones(256), torch.tensor([3, 4])
    for work, read, written in (
        (lambda: a.add_(b), 2 * KIB, KIB),
        (lambda: a.copy_(b), KIB, KIB),
        (lambda: a.fill_(0), 0, KIB),
        (lambda: a.view(16, 16).t()[2:], 0, 0),
        (lambda: torch.empty(256), 0, 0),
        (lambda: a[index], 2 * 8 + 2 * 4, 2 * 4),
        (lambda: a.index_copy_(0, index, b[:2]), 2 * 8 + 2 * 4 + 2 * 4, 2 * 4),
        (lambda: torch._foreach_mul_([a, b], 2.0), 2 * KIB, 2 * KIB),
        (lambda: b.expand(4, 256) + 1, KIB, 4 * KIB),
    ):
        found = count(work)
        assert (found.bytes_read, found.bytes_written) == (read, written), found
    assert size_of(a.expand(0, 256)) == 0 and size_of(a.to_sparse()) == 0


def test_memory():
    a = torch.ones(256)

    def work():
        b = a * 2  # 1 KiB
        c = torch.cat([a, b, b])  # 3 KiB
        del b
        return c.add_(1), a.add_(1)  # nothing new

    found = count(work)
    assert (found.largest, found.peak) == (3 * KIB, 4 * KIB)


def test_waits_for_the_device_are_counted():
    x = torch.tensor([1.0, 0.0, 2.0])
    for work, waits in (
        (lambda: x.sum().item(), 1),
        (lambda: bool(x.any()), 1),
        (lambda: x.tolist(), 1),
        (lambda: x.nonzero(), 1),
        (lambda: x[x > 0], 1),
        (lambda: x.cpu(), 1),
        (lambda: torch.masked_select(x, x > 0), 1),
        (lambda: torch.bincount(x.long()), 1),
        (lambda: torch.where(x > 0, x, 0.0), 0),
        (lambda: x.topk(2), 0),
    ):
        assert count(work).syncs == waits, count(work)


def test_counts_are_subtracted_by_op():
    a, b = Counts(ops=5, flops=7, by_op={"x": 2, "y": 1}), Counts(ops=2, flops=7, by_op={"x": 2, "z": 1})
    assert a.minus(b) == Counts(ops=3, by_op={"y": 1, "z": -1}) and a.bytes == 0


needs_kernels = pytest.mark.skipif(library.why_not_loaded() is not None, reason="kernels not built")


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_compiled_ops_of_the_distillers_count_as_one(name):
    student, teacher, batch = inputs()
    module = build(name)
    found = count(lambda: sum(losses(name, module, student, teacher, batch).values()).backward())
    own = {op.split("::")[1]: number for op, number in found.by_op.items() if op.startswith("fastkd::")}
    expected = {
        "lgd": {"norm_relu_box_pool", "box_paint_conv3x3", "instance_norm_mse"},
        "lgd masks": {"mask_pool", "mask_paint", "instance_norm_mse"},
        "icd": {"instance_attention", "value_mimic"},
        "fgfi": {"masked_mse"},
    }[name]
    both = {*expected, *(f"{op}_backward" for op in expected)}
    if name.startswith("lgd"):  # the instructive pyramid has no loss here
        both -= {
            "norm_relu_box_pool_backward",
            "box_paint_conv3x3_backward",
            "mask_pool_backward",
            "mask_paint_backward",
        }
    lone = {"lgd": {"conv3x3_taps"}, "icd": {"attention_mass", "seeded_noise"}, "fgfi": {"imitation_mask"}}
    assert own == dict.fromkeys({*both, *lone.get(name, set())}, 1)


@needs_kernels
def test_bytes_and_products_of_compiled_ops():
    levels = [torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3)]
    size = 4 * sum(level.numel() for level in levels)
    others = [level.clone() for level in levels]
    found = count(lambda: ops.instance_norm_mse(levels, others))
    assert found.bytes_read == 2 * size and found.flops == 10 * size // 4
    boxes, index = torch.tensor([[0.0, 0.0, 20.0, 20.0]]), torch.tensor([0])
    pooled = count(lambda: ops.norm_relu_box_pool(levels, boxes, index, (32, 48)))
    checked = count(lambda: checks.check_object_values("x", index, 2, boxes))
    read = pooled.bytes_read - checked.bytes_read
    assert read == 2 * size + size_of(boxes) + size_of(index)  # statistics first
    queries, weight = torch.randn(2, 2, 3, 4), torch.randn(8, 8)
    rows, columns = ([torch.zeros(2, 2, 3, level.shape[axis]) for level in levels] for axis in (2, 3))
    attended = count(lambda: ops.instance_attention(queries, levels, weight, rows, columns, others))
    cells, absorb = 2 * (24 + 6), 2 * 2 * 2 * 3 * 4 * 8
    assert attended.flops == absorb + 2 * cells * (2 * 3 * 8 + 8 * 3)


def test_an_op_without_a_formula_is_refused(monkeypatch):
    monkeypatch.delitem(fastkd_costs.FLOPS, "seeded_noise")
    with pytest.raises(ValueError, match=r"fastkd::seeded_noise must have a formula; add it to fastkd_costs\.py"):
        count(lambda: torch.ops.fastkd.seeded_noise([1], [2], 2))
