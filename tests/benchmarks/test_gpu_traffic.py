"""Compares the traffic model of benchmarks/gpu/traffic.py with the bytes counted by the emulation."""

import pytest
import simt
import torch

from benchmarks.gpu import roofline
from benchmarks.gpu import traffic as gpu_traffic
from benchmarks.ops.draws import Draw, Shape

SHAPE = Shape(2, 160, 224, 64, 4, strides=(8, 16, 32), boxes=3)
SIZES = [side for size in SHAPE.level_sizes for side in size]


class Count:
    """Runs ops in the emulation and sums their traffic."""

    def __init__(self):
        self.moved = self.asked = 0

    def __call__(self, *call):
        result = simt.run(*call)
        counted = simt.module.traffic()
        self.moved += counted["read"] + counted["written"]
        self.asked += counted["asked"]
        return result


def instance_norm_mse(draw, run):
    student, teacher = draw.pyramid(), draw.pyramid()
    loss, moments = run("instance_norm_mse", student, teacher, 1e-5)
    run("instance_norm_mse_backward", loss, student, teacher, moments, True, False)


def value_mimic(draw, run):
    arguments = draw.pyramid(), draw.pyramid(), [level.float().square() for level in draw.pyramid(SHAPE.heads)]
    loss, total = run("value_mimic", *arguments, 1e-5)
    run("value_mimic_backward", loss, *arguments, total, 1e-5)


def box_pool(draw, run):
    boxes, size = draw.boxes(), SHAPE.image_size
    pooled = run("box_pool", draw.pyramid(), *boxes, size)
    last = [draw.format == torch.channels_last] * len(SHAPE.strides)
    run("box_pool_backward", pooled, *boxes, size, SHAPE.images, SIZES, last)


def box_paint(draw, run):
    boxes, size = draw.boxes(), SHAPE.image_size
    painted = run("box_paint", draw.embeddings().detach(), *boxes, size, SHAPE.images, SIZES)
    run("box_paint_backward", painted, *boxes, size)


def norm_relu_box_pool(draw, run):
    boxes, levels = draw.boxes(), draw.pyramid()  # the boxes of the model are drawn first
    pooled, kept, normal = run("norm_relu_box_pool", levels, *boxes, *SHAPE.image_size, 1e-5)
    run("norm_relu_box_pool_backward", pooled, levels, *boxes, *SHAPE.image_size, kept, normal)


# For contiguous levels the model counts sectors of 32 bytes per covered cell, the emulation packs of 16.
EVERYTHING, COVERED = (instance_norm_mse, value_mimic), (box_pool, box_paint, norm_relu_box_pool)


@pytest.mark.parametrize(
    ("op", "last"), [*((op, False) for op in EVERYTHING), *((op, True) for op in EVERYTHING + COVERED)]
)
def test_the_emulation_counts_the_same(op, last):
    count = Count()
    op(Draw(SHAPE, torch.bfloat16, last, torch.device("cpu")), count)
    launches = gpu_traffic.MODELS[op.__name__](SHAPE, 2, last)
    assert count.moved == pytest.approx(sum(launch.read + launch.written for launch in launches), rel=0.05)
    assert count.asked >= count.moved


@pytest.mark.parametrize("queries", [7, 42, 64])
def test_the_attentions_partial_sums_are_those_of_its_plan(queries):
    """For a shape whose images and heads fill the card."""
    triton_report = pytest.importorskip("benchmarks.gpu.triton_report", reason="Triton is not installed")
    shape = Shape(8, 800, 1216, queries=queries)
    channels, heads = shape.channels, shape.heads
    case = triton_report.Case("forward", projected=not gpu_traffic._absorbed(shape, queries), count=queries)
    arguments, card = triton_report._arguments(case, channels, heads, shape.images), triton_report.Card(9, 132)
    launches, output, _, normal = triton_report.attention_forward.plan_forward(*arguments, card=card)
    model = gpu_traffic.instance_attention(shape, 2, True)

    def held(given):
        return sum(one.numel() * one.element_size() for one in given)

    partial = held(launches[0].arguments[name] for name in ("part_maximum", "part_sum", "part_output"))
    assert partial == model[0].written == model[1].read
    backward, _ = triton_report.attention_backward.plan_backward(output, output, normal, *arguments, True, True, card)
    parts, sums = (backward[1].arguments[name] for name in ("parts", "sums"))
    several = [place for place, one in enumerate(parts) if len(one) > 1]  # the others are their sums
    assert held(parts[place] for place in several) == model[3].read
    assert held(sums[place] for place in several) == model[3].written
    assert len(launches) + len(backward) == len(model)


def test_what_is_least_is_less():
    for name, model in gpu_traffic.MODELS.items():
        for last in (False, True):
            if name not in gpu_traffic.OWN_AIMS:
                moved = sum(launch.read + launch.written for launch in model(SHAPE, 2, last))
                assert gpu_traffic.least(name, SHAPE, 2, last) <= moved * 1.001, name


def test_a_launch_takes_the_longest_of_its_limits():
    card = roofline.H100
    launch = gpu_traffic.Launch("kernel", 2e9, 1e9, cache=8e9)
    assert launch.seconds(card) == pytest.approx(8e9 / gpu_traffic.CACHE["H100"])
    assert gpu_traffic.Launch("kernel", 2e9, 1e9).seconds(card) == pytest.approx(3e9 / card.bandwidth)


def test_the_table_of_aims():
    lines = gpu_traffic.aims(roofline.PUBLISHED, roofline.H100)
    assert lines[0].startswith("PREDICTED on H100, nothing measured")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[3:]]
    assert len(rows) == 2 * (len(gpu_traffic.MODELS) - len(gpu_traffic.OWN_AIMS)) + 2
    for row in rows:
        aim, model = (float(cell.strip("<>=%x ")) for cell in row[6:8])
        assert row[8] == ("yes" if (model <= aim if "x" in row[6] else model >= aim) else "NO"), row
