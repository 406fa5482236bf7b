"""The rows of the papers' tables: they can be built and carry the published settings and AP; other batch sizes."""

import dataclasses

import pytest
import torch

from fastkd.commands.train import parse
from fastkd.detectors import build_detector
from fastkd.training import all_recipes, get_recipe, scale_to_batch
from fastkd.training.config import Schedule
from fastkd.training.recipes.papers import PUBLISHED, ROWS, published_ap
from fastkd.training.schedule import steps_of


def test_every_recipe_can_be_built():
    """On the meta device, each different detector once."""
    for config in {recipe.detector for recipe in all_recipes().values()}:
        with torch.device("meta"):
            detector = build_detector(config)
        assert detector.imitation_anchors() or config.detector == "solov2"
        assert detector.num_classes in (1, 10, 80)


def test_the_promised_rows_exist():
    names = set(all_recipes())
    for detector in ("retinanet", "fcos", "faster-rcnn"):
        assert {f"coco-{detector}-lgd", f"coco-{detector}-r50-2x-ss-lgd", f"coco-{detector}-r50-2x-baseline"} <= names
        for backbone in ("r101", "r101-dcn", "x101-dcn"):
            for scale in ("", "-ss"):
                assert {f"coco-{detector}-{backbone}-2x{scale}-{m}" for m in ("baseline", "lgd")} <= names
    for detector in ("retinanet", "mask-rcnn"):
        assert {f"coco-{detector}-swin-t-3x-{m}" for m in ("baseline", "lgd")} <= names
    for detector in ("retinanet", "faster-rcnn", "fcos", "mask-rcnn", "atss", "condinst", "solov2"):
        assert {f"coco-{detector}-mbv2-{m}" for m in ("baseline", "icd")} <= names


def test_rows_differ_from_the_plain_recipe_as_published():
    row = get_recipe("coco-fcos-x101-dcn-2x-ss-lgd")
    assert (row.detector.backbone, row.detector.deformable) == ("resnext101_32x8d", True)
    assert row.data.short_sides == (800,) and row.data.max_side == 1333 and row.schedule.steps == 180_000
    assert [steps_of(m, 180_000) for m in row.optimizer.milestones] == [120_000, 160_000]
    assert row.method.context and row.method.final_fraction == 50 / 180
    assert row.backbone_weights == "weights/resnext101_32x8d.pth" and row.detector.frozen_stages == 2
    assert not get_recipe("coco-fcos-r50-2x-ss-lgd").method.context
    assert not get_recipe("coco-faster-rcnn-r101-2x-lgd").method.context
    assert get_recipe("coco-fcos-r101-2x-lgd").method.final_fraction == 0
    baseline = get_recipe("coco-retinanet-r101-2x-baseline")
    assert baseline.method is None and len(baseline.data.short_sides) == 6 and baseline.optimizer.learning_rate == 0.01

    swin = get_recipe("coco-mask-rcnn-swin-t-3x-lgd")
    assert (swin.optimizer.kind, swin.optimizer.learning_rate, swin.optimizer.weight_decay) == ("adamw", 1e-4, 0.05)
    assert [steps_of(m, swin.schedule.steps) for m in swin.optimizer.milestones] == [210_000, 250_000]
    assert swin.method.use_masks and swin.detector.frozen_stages == 0

    mobile = get_recipe("coco-condinst-mbv2-icd")
    plain = get_recipe("coco-condinst-icd")
    assert mobile.detector == dataclasses.replace(plain.detector, backbone="mobilenet_v2")
    assert mobile.teacher == plain.teacher == "runs/coco-condinst-teacher/student.safetensors"
    assert (mobile.method, mobile.schedule, mobile.method_optimizer) == (
        plain.method,
        plain.schedule,
        plain.method_optimizer,
    )
    assert get_recipe("coco-condinst-teacher").schedule.steps == 270_000


@pytest.mark.parametrize("name", [name for name in ROWS if name.endswith("-lgd")])
def test_lgd_and_baseline_rows_differ_in_the_method_alone(name):
    baseline = get_recipe(name.replace("-lgd", "-baseline"))
    assert dataclasses.replace(get_recipe(name), name=baseline.name, method=None) == baseline


def test_published_figures_belong_to_recipes():
    assert set(PUBLISHED) <= set(all_recipes())
    gains = {"retinanet": ("37.4", "40.7"), "solov2": ("mask 34.6", "mask 38.5"), "atss": ("39.6", "43.0")}
    for detector, figures in gains.items():
        assert (published_ap(f"coco-{detector}-baseline"), published_ap(f"coco-{detector}-icd")) == figures
    assert published_ap("coco-poto-lgd") == published_ap("scenes-retinanet-icd") == "-"


def test_scaling_to_a_batch():
    recipe = get_recipe("coco-retinanet-icd")
    small = scale_to_batch(recipe, 4)
    assert small.schedule == Schedule(steps=360_000, batch_size=4)
    assert small.optimizer.learning_rate == pytest.approx(0.0025)
    assert small.method_optimizer.learning_rate == pytest.approx(2.5e-5)
    assert (
        small.optimizer.milestones == recipe.optimizer.milestones and small.optimizer.warmup == recipe.optimizer.warmup
    )
    assert scale_to_batch(recipe, 16) == recipe
    large = scale_to_batch(small, 32)
    assert large.schedule.steps == 45_000 and large.optimizer.learning_rate == pytest.approx(0.02)
    assert scale_to_batch(get_recipe("coco-retinanet-lgd"), 8).method_optimizer is None
    pair, plain = scale_to_batch(get_recipe("scenes-retinanet-lgdicd"), 4), get_recipe("scenes-retinanet-lgdicd")
    for scaled, own in (
        (pair.optimizer, plain.optimizer),
        (pair.method_optimizer, plain.method_optimizer),
        (pair.method.lgd_optimizer, plain.method.lgd_optimizer),
    ):
        assert scaled.learning_rate == pytest.approx(own.learning_rate / 4)
    halves = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, accumulate=4))
    assert scale_to_batch(halves, 8).schedule.accumulate == 4
    with pytest.raises(ValueError, match="multiple of accumulate = 4, got 6"):
        scale_to_batch(halves, 6)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        scale_to_batch(recipe, 0)


def test_the_command_line_scales_after_the_other_options():
    recipe, _ = parse(
        "coco-fcos-lgd", ["--scale-batch", "8", "--schedule.steps", "100", "--optimizer.learning-rate", "1"]
    )
    assert recipe.schedule == Schedule(steps=200, batch_size=8) and recipe.optimizer.learning_rate == 0.5


def test_a_batch_size_without_its_rate_is_warned_of(caplog):
    recipe, _ = parse("coco-fcos-lgd", ["--schedule.batch-size", "8"])
    assert recipe.schedule == Schedule(steps=180_000, batch_size=8) and recipe.optimizer.learning_rate == 0.01
    assert "learning rate 0.01 was set for batches of 16, got 8" in caplog.text and "--scale-batch 8" in caplog.text
    caplog.clear()
    parse("coco-fcos-lgd", ["--schedule.batch-size", "8", "--optimizer.learning-rate", "0.005"])
    parse("coco-fcos-lgd", ["--scale-batch", "8"])
    parse("coco-fcos-lgd", [])
    assert not caplog.records
