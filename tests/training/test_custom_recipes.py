"""Recipes for one's own data set: the facts, the rule, the command line."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from tiny_runs import make_tiny_data, silent

from fastkd.commands.train import parse
from fastkd.data import open_dataset
from fastkd.data.facts import measure_facts
from fastkd.training import DataConfig, get_recipe, parse_cli, recipe_names, train
from fastkd.training.recipes.custom import NOMINAL, choose, data_options, summary
from fastkd.training.recipes.named import fitted_recipe

FACTS = dataclasses.replace(NOMINAL, images=600, small_box=12.0, median_box=24.0, short_side=256.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


def write_set(root, sizes, boxes):
    """A data set of one class. Args: sizes: (width, height) by image; boxes: (image index, xywh)."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes)]
        for image in images:
            pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
            Image.fromarray(pixels).save(root / split / image["file_name"])
        entries = [
            {"id": n, "image_id": i, "category_id": 5, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for n, (i, box) in enumerate(boxes)
        ]
        content = {"images": images, "annotations": entries, "categories": [{"id": 5, "name": "tree"}]}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def test_facts_of_a_set_by_hand(tmp_path):
    root = write_set(
        tmp_path / "set",
        [(200, 100), (120, 60), (50, 50)],
        [(0, [0, 0, 10, 40]), (0, [5, 5, 20, 20]), (1, [0, 0, 16, 4])],
    )
    facts = measure_facts(open_dataset("coco", root / "annotations/train.json", root / "train"))
    assert (facts.images, facts.objects, facts.classes, facts.most_objects) == (3, 3, 1, 2)
    assert facts.median_box == 20 and facts.small_box == pytest.approx(8 + 0.2 * 12)
    assert facts.ratios == pytest.approx((0.25 + 0.75 / 3, 1.0, 4 - 3 * 1 / 3))
    assert facts.short_side == 60 and facts.elongation == 2


def test_the_nominal_set_gets_the_scenes_recipe():
    for name in ("retinanet-lgd", "fcos-fgfi", "faster-rcnn-icd"):
        scenes, custom = get_recipe(f"scenes-{name}"), get_recipe(f"custom-{name}")
        assert custom.detector == scenes.detector and custom.optimizer == scenes.optimizer
        assert custom.data.short_sides == scenes.data.short_sides and custom.method == scenes.method
        assert custom.data.root == "data/custom"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"side": 352, "scale": 1.375, "steps": 2700, "batch_size": 8, "anchor_base": 2.5, "rate": 4.9e-4}),
        ({"images": 75}, {"steps": 700, "rate": 1.1e-3, "warmup": 0.1}),  # an eighth of the images: a quarter
        ({"images": 10}, {"steps": 500}),
        ({"images": 118_000}, {"steps": 90_000, "warmup": 0.05}),
        ({"median_box": 64.0, "small_box": 32.0}, {"side": 128, "batch_size": 16, "rate": 7e-4}),
        ({"median_box": 4.0, "small_box": 2.0}, {"side": 512, "scale": 2.0, "anchor_base": 1.5}),
        ({"short_side": 100.0, "median_box": 4.0, "small_box": 2.0}, {"side": 224}),  # not more than twice as large
        ({"most_objects": 150}, {"detections": 225}),
        ({"ratios": (0.4, 1.0, 1.1)}, {"anchor_ratios": (0.4, 1.0)}),
        ({"ratios": (1.0, 2.0, 3.0)}, {"anchor_ratios": (1.0, 2.0, 3.0)}),
        ({"ratios": (0.7, 1.0, 1.4)}, {"anchor_ratios": (1.0,)}),
    ],
)
def test_the_recipe_follows_the_annotations(changes, expected):
    chosen = choose(dataclasses.replace(FACTS, **changes), "retinanet")
    for name, value in expected.items():
        assert getattr(chosen, name) == pytest.approx(value), name


def test_detectors_without_anchors_get_no_ratios():
    facts = dataclasses.replace(FACTS, ratios=(0.4, 1.0, 2.0))
    assert choose(facts, "fcos").anchor_ratios is None
    assert get_recipe("custom-fcos-lgd", facts).detector.anchor_ratios is None


def test_the_summary_names_what_was_chosen_and_advises_tiles():
    text = summary(FACTS, "retinanet")
    assert text.startswith("600 images of 256 px with 300 objects of 10 classes, median box 24 px, small ones 12 px:")
    assert "2,700 steps of 8 images, side 352 (median box 33 px), anchor base 2.5, ratios 1, rate 0.00049" in text
    assert "tile" not in text and "ratios" not in summary(FACTS, "fcos")
    large = dataclasses.replace(FACTS, short_side=4000.0)
    assert "small boxes are 2 px at that side, less than a cell: cut tiles with `fastkd data tile`" in summary(
        large, "retinanet"
    )


def test_there_is_a_recipe_for_every_detector_and_method():
    names = set(recipe_names())
    scenes = {name.removeprefix("scenes-") for name in names if name.startswith("scenes-")}
    custom = {name.removeprefix("custom-") for name in names if name.startswith("custom-")}
    assert scenes - custom == {"teacher", "resnet18-backbone", "resnet34-backbone"} and custom <= scenes
    recipe = get_recipe("custom-retinanet-icd")
    assert recipe.teacher == "runs/custom-retinanet-teacher/student.safetensors"
    teacher = get_recipe("custom-retinanet-teacher")
    assert teacher.backbone_weights == "asset:scenes-retinanet-teacher.safetensors"


def test_the_command_line_measures_the_named_set_and_flags_override(data, capsys):
    args = ["--data.root", str(data), "--optimizer.learning-rate", "0.005", "--schedule.steps", "7"]
    recipe = parse("custom-retinanet-lgd", args)[0]
    said = " ".join(capsys.readouterr().err.split())
    facts = measure_facts(open_dataset("coco", data / "annotations/train.json", data / "train"))
    assert f"custom-retinanet-lgd: {summary(facts, 'retinanet')}" in said
    chosen = choose(facts, "retinanet")
    assert recipe.schedule.steps == 7 and recipe.optimizer.learning_rate == 0.005 and recipe.data.root == str(data)
    assert recipe.data.short_sides == (chosen.side,) and recipe.detector.anchor_base == chosen.anchor_base
    assert parse_cli("custom-retinanet-lgd", args) == recipe
    pair = parse_cli("custom-retinanet-lgdicd", ["--data.root", str(data)])
    assert pair.data == recipe.data and pair.method.kind == "lgd-icd"


def test_data_options_take_both_spellings():
    args = ["--seed", "3", "--data.train_annotations", "a.json", "--data.root=x y", "--data.format", "crowdhuman"]
    expected = DataConfig(root="x y", train_annotations="a.json", format="crowdhuman")
    assert data_options(args, DataConfig()) == expected


def test_a_missing_set_is_an_error_and_help_needs_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="image_dir must be an existing folder"):
        fitted_recipe("custom-retinanet-lgd", ["--data.root", str(tmp_path)])
    assert fitted_recipe("custom-retinanet-lgd", ["--help"]) == (get_recipe("custom-retinanet-lgd"), None)
    assert fitted_recipe("scenes-retinanet-lgd") == (get_recipe("scenes-retinanet-lgd"), None)


def test_a_set_without_objects_is_an_error(tmp_path):
    root = write_set(tmp_path / "set", [(40, 40)], [])
    with pytest.raises(ValueError, match="measure_facts: dataset must have at least one object, got none in 1 images"):
        fitted_recipe("custom-retinanet-lgd", ["--data.root", str(root)])


def test_a_custom_recipe_trains_with_the_teacher_of_its_family(data, tmp_path, monkeypatch):
    """The teacher and a student of it, two steps each, from one flag."""
    monkeypatch.chdir(tmp_path)
    short = ["--data.root", str(data), "--schedule.steps", "2", "--schedule.batch-size", "2", "--data.workers", "0"]
    short += ["--runtime.ledger-pairs", "0", "--data.short-sides", "64", "--data.val-short-side", "64"]
    for name in ("custom-retinanet-teacher", "custom-retinanet-icd"):
        result = train(parse_cli(name, short), f"runs/{name}", device="cpu", console=silent())
        assert result.status == "finished"
