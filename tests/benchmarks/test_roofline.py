"""The roofline model: bytes and operations against counts by hand, predictions labelled as such."""

import dataclasses

import pytest
import torch

from benchmarks.gpu import predictions, roofline
from benchmarks.gpu.roofline import Card, Work
from benchmarks.ops.draws import QUICK, Draw, Shape
from benchmarks.ops.rows import ROWS
from fastkd import ops

# Levels 2 x 3 and 1 x 2: 8 cells, 64 numbers in a pyramid. 3 boxes: 12 numbers a level in embeddings, 24 in all.
TINY = Shape(2, 16, 24, 4, 2, strides=(8, 16), boxes=3, queries=5, real=3, anchors=3)
BYTES = {  # of bfloat16
    "instance_norm_mse": 5 * 64 * 2,
    "box_pool": (2 * 64 + 2 * 48) * 2,
    "box_paint": (2 * 64 + 2 * 48) * 2,
    "box_paint_conv3x3": (2 * 64 + 2 * 48 + 2 * 144) * 2 + 4 * 432 * 4,
    "norm_relu_box_pool": (4 * 64 + 2 * 48) * 2,
    "instance_attention": 5 * 64 * 2,
    "attention_mass": 64 * 2 + 4 * 32,
    "value_mimic": 5 * 64 * 2 + 2 * 4 * 32,
    "imitation_mask": 16,
    "masked_mse": 64 * 2 + 85 + 2 * 16,  # 4 * 64 * 2 / 6
    "mask_pool": (2 * 64 + 2 * 48) * 2 + 2 * 6 * 16 * 24,
    "mask_paint": (2 * 64 + 2 * 48) * 2 + 2 * 6 * 16 * 24,
}


def test_every_op_has_a_model():
    names = {name for name in ops.__all__ if f"{name}_reference" in ops.__all__}
    assert {model.__name__ for model in roofline.OPS} == names == set(BYTES)


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_an_op(name):
    tiny = dataclasses.replace(TINY)
    assert (tiny.cells, tiny.elements) == (8, 64)
    assert roofline.MODELS[name](tiny, 2).bytes == BYTES[name]


def test_products():
    # absorbed: 2 heads * 5 queries * 4 channels = 40 a cell; projected: 4 * (4 + 5) = 36 forward, 4 * (4 + 10) backward
    assert roofline.instance_attention(TINY, 2).matrix == 2 * 16 * (36 + 3 * 5 * 4 + 40)
    assert roofline.attention_mass(TINY, 2).matrix == 2 * 16 * min(2 * 3 * 4, 4 * (4 + 3))
    assert roofline.imitation_mask(TINY, 2).scalar == 2 * 14 * 6 * 8 * 3


def test_the_benchmark_counts_the_same():
    """Bytes of float32 up to small tensors, multiply-adds exactly."""
    for row in ROWS:
        case = row.build(Draw(QUICK, torch.float32, False, torch.device("cpu")))
        model = roofline.MODELS.get(row.build.__name__)
        if case.multiply_adds:
            assert 2 * case.multiply_adds == model(QUICK, 4).matrix
        elif case.passes and row.name != "masked_mse":  # its model omits unmasked cells
            large = dataclasses.replace(QUICK, boxes=0)
            weights = 2 * 9 * QUICK.channels**2 * 4 if row.name == "box_paint_conv3x3" else 0
            moved = 4 * sum(sum(part.reads) + part.writes for part in case.passes)
            assert model(large, 4).bytes - weights == pytest.approx(moved, rel=0.01)


def test_the_longest_of_three_limits():
    card = Card("card", bandwidth=100, tensor=1000, scalar=10, source="none")
    assert Work(500).seconds(card, True) == 5 and Work(500).limit(card, True) == "bytes"
    assert Work(500, matrix=8000).seconds(card, True) == 8
    assert Work(500, matrix=8000).seconds(card, False) == 800
    assert Work(500, scalar=70).seconds(card, True) == 7 and Work(500, scalar=70).limit(card, True) == "operations"


def test_predictions_are_labelled(capsys):
    predictions.main(["--images", "2", "--dtype", "float32"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PREDICTED times, ms") and "nothing here was measured" in lines[0]
    assert "B = 2, 800 x 1344" in lines[0] and "float32" in lines[0]
    assert lines[1].count("PREDICTED") == len(roofline.CARDS)
    assert sum(line.startswith("| ") for line in lines[: lines.index("")]) == 1 + len(roofline.OPS)
    assert lines[lines.index("") + 1].startswith("PREDICTED on H100, nothing measured")


def test_achieved_shares_of_the_limit():
    rows = {"value_mimic": {"shape": dataclasses.asdict(TINY), "sides": {"ours": {"ms": 1.0}, "bfloat16": {"ms": 2.0}}}}
    lines = roofline.achieved(rows, "NVIDIA H100 80GB HBM3")
    assert "PREDICTED" in lines[0] and [line.split(" | ")[1:3] for line in lines[2:]] == [
        ["float32", "1.000"],
        ["bfloat16", "2.000"],
    ]
    assert roofline.achieved(rows, "Tesla T4")[0].startswith("No predictions for Tesla T4: ")
