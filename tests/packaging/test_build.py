"""Checks before a run: classes, teachers, weights and data are consistent, or a clear error."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny_runs import make_tiny_data, silent, teacher_file, tiny_detector, tiny_recipe

from fastkd.detectors import build_detector, load_detector, save_detector
from fastkd.distillers import FGFI
from fastkd.training import get_recipe, step, train
from fastkd.training.build import build, open_data
from fastkd.training.config import Schedule


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


def test_initial_weights_do_not_depend_on_the_method(tiny_data):
    states = [build(tiny_recipe(tiny_data, method=m)).module.detector.state_dict() for m in ("baseline", "lgd", "fgfi")]
    for state in states[1:]:
        assert all(torch.equal(state[k], states[0][k]) for k in states[0])
    other = build(tiny_recipe(tiny_data, seed=1)).module.detector.state_dict()
    assert any(not torch.equal(other[k], states[0][k]) for k in other)


def copied(data, tmp_path):
    return shutil.copytree(data, tmp_path / "data")


def relabel(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_classes_come_from_the_data(tiny_data, tmp_path):
    root = copied(tiny_data, tmp_path)
    for part in ("train", "val"):

        def keep_three(content):
            content["categories"] = content["categories"][:3]
            kept = {c["id"] for c in content["categories"]}
            content["annotations"] = [a for a in content["annotations"] if a["category_id"] in kept]

        relabel(root / f"annotations/{part}.json", keep_three)
    recipe = tiny_recipe(root, schedule=Schedule(steps=1, batch_size=2))
    run = tmp_path / "run"
    assert train(recipe, run, device="cpu", console=silent()).status == "finished"
    assert load_detector(run / "student.safetensors")[0].num_classes == 3
    assert json.loads((run / "recipe.json").read_text())["detector"]["num_classes"] == 3
    assert train(recipe, run, device="cpu", console=silent(), resume=True).status == "already finished"
    exact = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, match_classes=False))
    with pytest.raises(ValueError, match=r"detector.num_classes must be 3.*got 10.*--detector.num-classes 3"):
        train(exact, tmp_path / "other", device="cpu", console=silent())
    assert not (tmp_path / "other").exists()


def test_unfit_teachers_are_refused_before_training(tiny_data, tmp_path):
    names = open_data(tiny_recipe(tiny_data))[0].class_names

    def refused(message, error=ValueError, **changes):
        recipe = tiny_recipe(tiny_data, method="fgfi", **changes)
        with pytest.raises(error, match=message):
            train(recipe, tmp_path / "run", device="cpu", console=silent())
        assert not (tmp_path / "run").exists()

    def teacher(detector, names):
        save_detector(build_detector(detector), tmp_path / "teacher.safetensors", names)
        return str(tmp_path / "teacher.safetensors")

    few = tiny_detector("retinanet", num_classes=3)
    refused("teacher.*10 classes, got 3", teacher=teacher(few, names[:3]))
    refused("class names.*in the same order", teacher=teacher(tiny_detector("retinanet"), names[::-1]))
    refused("pyramid.*strides", teacher=teacher(tiny_detector("faster-rcnn"), names))
    refused("does not exist.*--teacher", FileNotFoundError, teacher=str(tmp_path / "absent.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    refused("broken.safetensors", teacher=str(tmp_path / "broken.safetensors"))
    refused("does not exist.*--backbone-weights", FileNotFoundError, backbone_weights=str(tmp_path / "absent.pth"))


def test_unfit_data_is_refused_before_training(tiny_data, tmp_path):
    root = copied(tiny_data, tmp_path)
    recipe = tiny_recipe(root)
    relabel(root / "annotations/val.json", lambda c: c["categories"][0].update(name="something else"))
    with pytest.raises(ValueError, match=r"categories of annotations/val.json must be those of annotations/train.json"):
        train(recipe, tmp_path / "run", device="cpu", console=silent())
    with pytest.raises(FileNotFoundError):
        absent = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, val_annotations="absent.json"))
        train(absent, tmp_path / "run", device="cpu", console=silent())
    assert not (tmp_path / "run").exists()


def test_solov2_has_nothing_to_imitate(tiny_data):
    with pytest.raises(ValueError, match=r"FGFI: anchors must be a list .* got none; use ICD or LGD"):
        FGFI(build_detector(tiny_detector("solov2")).imitation_anchors())


def test_a_distiller_that_needs_a_teacher_gets_one(tiny_data):
    module = build(tiny_recipe(tiny_data, method="icd")).module
    with pytest.raises(ValueError, match="teacher must be given for ICD"):
        step.StepModule(module.detector, module.distiller)


def test_missing_weights_are_answered_with_the_command_that_makes_them(tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method, changes, message in (
        (
            "inherit",
            {"teacher": "runs/scenes-atss-teacher/student.safetensors"},
            "`fastkd train scenes-atss-teacher` or pass",
        ),
        ("fgfi", {"teacher": "elsewhere/student.safetensors"}, "does not exist; pass --teacher PATH"),
        (
            "baseline",
            {"backbone_weights": get_recipe("scenes-fcos-teacher").backbone_weights},
            "`fastkd train scenes-resnet34-backbone` or pass",
        ),
        ("baseline", {"backbone_weights": "weights.pth"}, r"put weights of resnet18 of width 0.125 there or pass"),
    ):
        recipe = tiny_recipe(tiny_data, "fcos", method, **changes)
        with pytest.raises(FileNotFoundError, match=message):
            build(recipe)


def test_a_head_is_inherited_from_the_same_detector_only(tiny_data):
    recipe = tiny_recipe(tiny_data, "fcos", "inherit", teacher=str(teacher_file(tiny_data, "retinanet")))
    with pytest.raises(ValueError, match="teacher must be a fcos for its head to be inherited, got a retinanet"):
        build(recipe)
    alone = dataclasses.replace(tiny_recipe(tiny_data, "fcos", "fgfi"), teacher=recipe.teacher)
    assert "inherited" not in build(alone).notes


def test_training_images_without_any_object_are_refused(tiny_data, tmp_path):
    root = copied(tiny_data, tmp_path)
    relabel(root / "annotations/train.json", lambda content: content.update(annotations=[]))
    with pytest.raises(ValueError, match="must hold at least one object to learn from, got none in 20 images"):
        build(tiny_recipe(root))
