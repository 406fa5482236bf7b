"""CrowdHuman's format and the generated crowd: reading, training with ignore regions, evaluation, hostile files."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import silent, tiny_detector

from fastkd.cli import main
from fastkd.data import (
    BadImageError,
    CrowdHumanDataset,
    build_eval_loader,
    build_train_loader,
    generate_crowd,
    open_dataset,
)
from fastkd.data.crowd_render import CrowdStyle, render_crowd
from fastkd.detectors.common.targets import inside_ignored
from fastkd.evaluation import CrowdHumanEvaluator, evaluator_of
from fastkd.files import write_json
from fastkd.report import write_report
from fastkd.training import DataConfig, RuntimeConfig, Schedule, get_recipe, train
from fastkd.training.methods import kinds
from fastkd.training.run.finish import RunResult
from fastkd.training.schedule import steps_of
from fastkd.types import Detections


def person(full, visible=None, head=None, tag="person", **extra):
    return {"tag": tag, "fbox": full, "vbox": visible or full, "hbox": head or full, "extra": extra, "head_attr": {}}


LINES = [
    {"ID": "b,2", "gtboxes": [
        person([-4, 2, 14, 20], [0, 2, 10, 18], [2, 2, 4, 5], box_id=0),
        person([20, 4, 10, 20], head=[22, 4, 4, 5], ignore=1),
        person([5, 5, 20, 10], tag="mask", ignore=1)]},
    {"ID": "a,1", "gtboxes": []},
    {"ID": "c,3", "gtboxes": [person([3, 3, 8, 16], ignore=0) | {"head_attr": {"ignore": 1}}, person([90, 3, 8, 16])]},
]  # fmt: skip


def write_folder(root, lines=LINES):
    """An odgt file and noise images of 40 x 30 pixels: (file, folder)."""
    images = root / "Images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for line in LINES:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(images / f"{line['ID']}.jpg")
    file = root / "annotation.odgt"
    file.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return file, images


def test_boxes_and_regions(tmp_path):
    data = CrowdHumanDataset(*write_folder(tmp_path))
    assert (len(data), data.class_names, data.category_ids) == (3, ["person"], [1])
    assert data.image_ids.tolist() == [1, 2, 3] and data.sizes.tolist() == [[40, 30]] * 3
    assert data.file_name(0) == "b,2.jpg" and data.read_image(1).shape == (30, 40, 3)
    boxes, labels, ignore = data.targets(0)
    assert boxes.tolist() == [[0, 2, 10, 22]] and labels.tolist() == [0]
    assert ignore.tolist() == [[20, 4, 30, 24], [5, 5, 25, 15]]
    whole, ignored = data.truth(0)
    assert whole.tolist() == [[-4, 2, 10, 22], [20, 4, 30, 24], [5, 5, 25, 15]] and ignored.tolist() == [0, 1, 1]
    assert data.skipped == {"box outside the image": 1} and data.clipped == 1
    assert data.truth(2)[0].tolist() == [[3, 3, 11, 19], [90, 3, 98, 19]]  # misses of hidden people count
    assert len(data.truth(1)[0]) == 0 and len(data.targets(1)[0]) == 0


@pytest.mark.parametrize(
    ("boxes", "first", "ignored"),
    [("visible", [0, 2, 10, 20], [False]), ("head", [2, 2, 6, 7], [True]), ("full", [0, 2, 10, 22], [False])],
)
def test_which_boxes(tmp_path, boxes, first, ignored):
    data = open_dataset("crowdhuman", *write_folder(tmp_path), crowd_boxes=boxes)
    assert data.targets(0)[0][0].tolist() == first
    assert data.truth(2)[1][:1].tolist() == ignored


def test_loader_passes_regions_on(tmp_path):
    data = CrowdHumanDataset(*write_folder(tmp_path))
    (batch,) = build_eval_loader(data, batch_size=3, short_side=60, max_side=200)
    row = batch.image_ids.index(1)
    regions = batch.ignore_boxes[batch.ignore_index == row]
    assert regions.tolist() == [[40, 8, 60, 48], [10, 10, 50, 30]] and sum(batch.counts) == 2
    silenced = inside_ignored(batch, torch.tensor([[12.0, 12, 20, 20], [70, 0, 80, 10]]))
    assert silenced[row].tolist() == [True, False] and not silenced[1 - row].all()
    steps = list(build_train_loader(data, batch_size=2, total_steps=2, seed=1, short_sides=(60,), max_side=200))
    assert all(torch.isfinite(step.images).all() for step in steps)


# hostile files: a clear error, or a counted and logged skip

GOOD = json.dumps(LINES[0]) + "\n"
BAD_LINES = [
    ("not json", '{"ID": "a,1", "gtboxes": [\n', "line not JSON"),
    ("deep", "[" * 100_000 + "\n", "line not JSON"),
    ("long number", '{"ID": ' + "9" * 100_000 + "}\n", "line not JSON"),
    ("list", "[]\n", "malformed line"),
    ("coco", '{"images": [], "annotations": [], "categories": []}\n', "malformed line"),
    ("no ID", '{"gtboxes": []}\n', "malformed line"),
    ("ID a number", '{"ID": 3, "gtboxes": []}\n', "malformed line"),
    ("no boxes", '{"ID": "a,1"}\n', "malformed line"),
    ("boxes an object", '{"ID": "a,1", "gtboxes": {}}\n', "malformed line"),
    ("twice", json.dumps(LINES[0]) + "\n", "duplicate ID"),
    ("missing", '{"ID": "nowhere", "gtboxes": []}\n', "image file missing"),
    ("empty", '{"ID": "", "gtboxes": []}\n', "image file missing"),
    ("outside", '{"ID": "../Images/a,1", "gtboxes": []}\n', "file name outside the image folder"),
    ("absolute", '{"ID": "/etc/passwd", "gtboxes": []}\n', "file name outside the image folder"),
    ("nul", '{"ID": "a\\u0000", "gtboxes": []}\n', "file name outside the image folder"),
    ("surrogate", '{"ID": "\\ud800", "gtboxes": []}\n', "image file missing"),
    ("no image", '{"ID": "text", "gtboxes": []}\n', "unreadable image"),
]


@pytest.mark.parametrize(("line", "reason"), [case[1:] for case in BAD_LINES], ids=[case[0] for case in BAD_LINES])
def test_bad_lines(tmp_path, caplog, line, reason):
    file, images = write_folder(tmp_path, [GOOD, line])
    (images / "text.jpg").write_text("no picture")
    with caplog.at_level(logging.WARNING, logger="fastkd.data"):
        data = CrowdHumanDataset(file, images)
    assert len(data) == 1 and data.skipped == {reason: 1}
    assert f"{file}: line 2" in caplog.text and len(caplog.text) < 3000
    with pytest.raises(ValueError, match=r"line 2: .*pass strict=False"):
        CrowdHumanDataset(file, images, strict=True)


NAN, INF = float("nan"), float("inf")
BAD_BOXES = [
    (5, "malformed box"),
    ({}, "malformed box"),
    (person([1, 1, 5, 5]) | {"tag": 3}, "malformed box"),
    (person([1, 1, 5, 5]) | {"extra": []}, "malformed box"),
    (person([1, 1, 5, 5]) | {"extra": {"ignore": 2}}, "malformed box"),
    (person([1, 1, 5, 5]) | {"extra": {"ignore": "1"}}, "malformed box"),
    (person([1, 1, 5, 5]) | {"fbox": None}, "malformed box"),
    (person([1, 1, 5]), "malformed box"),
    (person([1, 1, "5", 5]), "malformed box"),
    (person([1, 1, True, 5]), "malformed box"),
    (person([1, 1, NAN, 5]), "box not finite"),
    (person([-INF, 1, 5, 5]), "box not finite"),
    (person([1, 1, 10**400, 5]), "box not finite"),
    (person([1, 1, 0, 5]), "box of no size"),
    (person([1, 1, 5, -5]), "box of no size"),
    (person([41, 1, 5, 5]), "box outside the image"),
]


@pytest.mark.parametrize(("box", "reason"), BAD_BOXES, ids=str)
def test_bad_boxes(tmp_path, box, reason):
    file, images = write_folder(tmp_path, [{"ID": "a,1", "gtboxes": [box, person([2, 2, 6, 9])]}])
    data = CrowdHumanDataset(file, images)
    assert data.skipped == {reason: 1} and data.targets(0)[0].tolist() == [[2, 2, 8, 11]]
    with pytest.raises(ValueError, match="line 1: box 0: "):
        CrowdHumanDataset(file, images, strict=True)


@pytest.mark.parametrize("content", [b"", b"\n\n", bytes(range(256)), b"[]", b"\xff\xfe"])
def test_files_without_a_usable_line(tmp_path, content):
    file, images = write_folder(tmp_path)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="at least one usable line of CrowdHuman's odgt format") as caught:
        CrowdHumanDataset(file, images)
    assert str(file) in str(caught.value)


def test_other_mistakes(tmp_path, monkeypatch):
    file, images = write_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"CrowdHumanDataset: annotation_file.*fastkd data crowd"):
        CrowdHumanDataset(tmp_path / "nowhere", images)
    with pytest.raises(FileNotFoundError, match="CrowdHumanDataset: image_dir"):
        CrowdHumanDataset(file, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="boxes must be one of full, visible, head"):
        CrowdHumanDataset(file, images, boxes="body")
    with pytest.raises(ValueError, match="format must be one of"):
        open_dataset("voc", file, images)
    with pytest.raises(ValueError, match="with_masks must be False"):
        open_dataset("crowdhuman", file, images, with_masks=True)
    with pytest.raises(ValueError, match="at least one usable line"):
        CrowdHumanDataset(file, images, max_pixels=100)
    monkeypatch.setattr("fastkd.data.crowdhuman.MAX_LINE", 50)
    with pytest.raises(ValueError, match="line 1 must be shorter than 50 bytes"):
        CrowdHumanDataset(file, images)
    (images / "a,1.jpg").write_bytes((images / "a,1.jpg").read_bytes()[:-200])
    monkeypatch.undo()
    data = CrowdHumanDataset(file, images)
    with pytest.raises(BadImageError, match="a,1"):
        data.read_image(1)


# the generated crowd


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    return generate_crowd(tmp_path_factory.mktemp("crowd") / "data", train=12, val=6, seed=3, processes=1)


def test_crowd_is_deterministic(crowd, tmp_path):
    again = generate_crowd(tmp_path / "again", train=12, val=6, seed=3, processes=2)
    names = sorted(path.relative_to(crowd) for path in crowd.rglob("*") if path.is_file())
    assert len(names) == 12 + 6 + 3
    for name in names:
        assert (crowd / name).read_bytes() == (again / name).read_bytes(), name
    stamp = (again / "crowd.json").stat().st_mtime_ns
    assert generate_crowd(again, train=12, val=6, seed=3).joinpath("crowd.json").stat().st_mtime_ns == stamp
    fewer = generate_crowd(again, train=1, val=0, seed=4, processes=1)
    assert len(list((fewer / "Images").iterdir())) == 1


def test_crowd_arguments(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"generate_crowd: root must be a new.*mine.txt"):
        generate_crowd(tmp_path, train=1, val=0)
    with pytest.raises(ValueError, match="train must be an int >= 0"):
        generate_crowd(tmp_path / "a", train=-1)
    with pytest.raises(TypeError, match=r"unknown arguments.*people"):
        generate_crowd(tmp_path / "a", people=3)
    for wrong in ({"crowding": 2}, {"heights": (5, 9)}, {"sizes": ((10, 10),)}):
        with pytest.raises(ValueError, match=f"CrowdStyle: {next(iter(wrong))}"):
            CrowdStyle(**wrong)


def test_crowd_is_a_crowd(crowd):
    """People overlap and extend beyond the image, and each box encloses its painted person."""
    people = [render_crowd(np.random.default_rng(i), CrowdStyle(throngs=1.0)) for i in range(12)]
    assert all(len(regions) == 1 for _, _, regions in people)
    found = [p for _, some, _ in people for p in some]
    assert 0.05 < np.mean([p.occluded for p in found]) < 0.8
    for p in found:
        (x1, y1, x2, y2), (vx1, vy1, vx2, vy2), (hx1, hy1, hx2, hy2) = p.full, p.visible, p.head
        assert x1 - 1 <= vx1 < vx2 <= x2 + 1 and y1 - 1 <= vy1 < vy2 <= y2 + 1
        assert x1 - 1 <= hx1 < hx2 <= x2 + 1 and y1 <= hy1 and hy2 - hy1 < 0.3 * (y2 - y1)
    data = CrowdHumanDataset(crowd / "annotation_train.odgt", crowd / "Images", strict=True)
    assert data.skipped == {} and data.clipped > 0 and len(data) == 12
    assert render_crowd(np.random.default_rng(0), CrowdStyle(empty=1.0, throngs=0.0))[1] == []


# evaluation and training


def test_evaluator_measures_in_pixels_of_the_file(crowd):
    data = CrowdHumanDataset(crowd / "annotation_val.odgt", crowd / "Images")
    evaluator = evaluator_of(data)
    assert isinstance(evaluator, CrowdHumanEvaluator)
    for batch in build_eval_loader(data, batch_size=2, short_side=64, max_side=200):
        found = []
        for row in range(len(batch)):
            boxes = batch.boxes[batch.image_index == row]
            scores = torch.linspace(0.9, 0.6, max(len(boxes), 1))[: len(boxes)]
            found.append(Detections(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64)))
        evaluator.add(batch, found)
    metrics = evaluator.compute()["bbox"]
    assert metrics["recall"] == 100 and metrics["MR"] < 1e-3 and metrics["JI"] == pytest.approx(100)
    assert metrics["images"] == 6 and metrics["per_class"]["person"]["AP"] == metrics["AP"]
    fewer = evaluator_of(data, 1)
    fewer._images = evaluator._images
    assert 0 < fewer.compute()["bbox"]["recall"] < 100
    with pytest.raises(ValueError, match="max_detections must be at least 1"):
        evaluator_of(data, 0)


def tiny_crowd(crowd, method, **changes):
    recipe = get_recipe(f"crowd-faster-rcnn-{method}")
    return dataclasses.replace(
        recipe,
        detector=tiny_detector("faster-rcnn", num_classes=1),
        data=dataclasses.replace(
            recipe.data, root=str(crowd), short_sides=(64,), val_short_side=64, max_side=96, workers=0
        ),
        backbone_weights=None,
        schedule=Schedule(steps=4, batch_size=2),
        runtime=RuntimeConfig(precision="float32", log_every=2, checkpoint_every=4, ledger_pairs=0, eval_every=2),
        **changes,
    )


def test_training_evaluation_and_report(crowd, tmp_path, capsys):
    run = tmp_path / "lgd"
    console = silent()
    result = train(tiny_crowd(crowd, "lgd"), run, device="cpu", console=console)
    assert {"AP", "MR", "JI", "recall"} <= set(result.metrics["bbox"]) and result.metrics["bbox"]["images"] == 6
    assert "MR^-2" in console.file.getvalue()
    evaluated = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if "bbox" in line]
    assert len(evaluated) == 1 and evaluated[0]["bbox"]["MR"] is not None
    out = tmp_path / "metrics.json"
    arguments = ["--annotations", crowd / "annotation_val.odgt", "--images", crowd / "Images", "--out", out]
    assert main(["evaluate", str(run), "--format", "crowdhuman", *map(str, arguments), "--workers", "0"]) == 0
    assert json.loads(out.read_text())["bbox"] == result.metrics["bbox"]
    assert main(["evaluate", str(run), *map(str, arguments)]) == 2  # an odgt file is not a COCO file
    assert "not JSON" in capsys.readouterr().err
    page = write_report([run], tmp_path / "report.html", images=1, methods=kinds()).read_text()
    assert "(CrowdHuman" in page and "lower is better" in page and "with pycocotools" not in page


def test_recipes_read_the_crowd_format():
    names = [f"{family}-faster-rcnn-{method}" for family in ("crowd", "crowdhuman") for method in ("baseline", "lgd")]
    for name in names:
        recipe = get_recipe(name)
        assert recipe.data.format == "crowdhuman" and recipe.detector.num_classes == 1
        plain = {"name": recipe.name, "method": recipe.method, "method_optimizer": recipe.method_optimizer}
        assert dataclasses.replace(get_recipe(name.replace("lgd", "baseline")), **plain) == recipe
    lgd = get_recipe("crowdhuman-faster-rcnn-lgd")
    assert lgd.method.detach_appearance and not lgd.method.context and lgd.detector.detections_per_image == 500
    assert lgd.schedule.steps * lgd.schedule.batch_size == 30 * 15_000
    assert [steps_of(m, 30) for m in lgd.optimizer.milestones] == [24, 27]
    with pytest.raises(ValueError, match="no masks on crowdhuman"):
        dataclasses.replace(lgd, method=None, detector=dataclasses.replace(lgd.detector, detector="mask_rcnn"))
    with pytest.raises(ValueError, match="DataConfig: format must be"):
        DataConfig(format="voc")
    with pytest.raises(ValueError, match="DataConfig: crowd_boxes must be"):
        DataConfig(crowd_boxes="body")


def test_the_crowd_demo_trains_and_prints_metrics(capsys, monkeypatch, tmp_path):
    """The command generates the data, trains a baseline and LGD under equal conditions and prints crowd metrics."""
    trained = []

    def fake_train(recipe, run_dir, **options):
        trained.append(recipe)
        metrics = {"bbox": {"AP": 50.0 + len(trained), "MR": 60.0, "JI": 40.0}, "seconds": 60.0}
        write_json(run_dir / "metrics.json", metrics)
        write_json(run_dir / "recipe.json", recipe.to_dict())
        return RunResult("finished", metrics, run_dir)

    monkeypatch.setattr("fastkd.training.train", fake_train)
    monkeypatch.setattr("fastkd.report.write_report", lambda runs, out, **options: out)
    data = tmp_path / "data"
    arguments = ["--out", str(tmp_path), "--data", str(data), "--images", "3", "--val-images", "2"]
    assert main(["demo", "--crowd", *arguments, "--steps", "2", "--seed", "5"]) == 0
    said = capsys.readouterr()
    assert "MR^-2" in said.out and "+1.0" in said.out and "60.0" in said.out and "report.html" in said.err
    assert len(CrowdHumanDataset(data / "annotation_train.odgt", data / "Images")) == 3
    plain, lgd = trained
    same = {"name": plain.name, "method": None, "method_optimizer": None}
    assert dataclasses.replace(lgd, **same) == plain and lgd.method is not None
    assert (plain.schedule.steps, plain.seed, plain.data.root) == (2, 5, str(data))
    assert main(["demo", "--crowd", "--teacher", "t.safetensors", *arguments]) == 2
    assert "--crowd must stand without --teacher" in capsys.readouterr().err
