"""The doctor reports each planted fault and no others."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_runs import make_tiny_data, tiny_recipe

from fastkd import assets, cli
from fastkd.data import build_train_loader
from fastkd.detectors import load_detector, save_detector
from fastkd.training import FGFIConfig, ICDConfig, LGDConfig, LGDICDConfig, get_recipe
from fastkd.training.build import build, open_data
from fastkd.training.doctor import checks as doctor
from fastkd.training.doctor.checks import (
    Finding,
    check_classes,
    check_cost,
    check_gradients,
    check_pyramids,
    check_start,
    check_switches,
    examine,
    judge_gradients,
    judge_losses,
)
from fastkd.training.doctor.teacher import check_quality
from fastkd.training.parallel.processes import Processes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(doctor, "FIT_STEPS", 2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


@pytest.fixture(scope="module")
def trained():
    """A teacher that ships with fastkd, and the classes of the scenes."""
    return load_detector(assets.resolve("asset:scenes-retinanet-teacher.safetensors"))


def first_batch(built, count=2):
    return next(iter(build_train_loader(built.train_set, batch_size=count, total_steps=1, short_sides=(64,))))


def named(findings, check, status="problem"):
    """The messages of a check with a status."""
    return " ".join(one.message for one in findings if (one.check, one.status) == (check, status))


def test_untrained_teacher_and_all_that_is_looked_at(scenes, shown):
    """A whole examination; the only fault of the recipe is the tests' untrained teacher."""
    found = list(examine(tiny_recipe(scenes, method="icd"), batches=1, device="cpu"))
    assert "looks untrained" in named(found, "teacher")
    assert shown["evaluate the teacher"][1:] == (1, 1) and shown["measure the gradients"] == ("batches", 1, 1)
    assert {"load batches", "train the method on fixed features"} <= set(shown)
    problems = {one.check for one in found if one.status == "problem"}
    assert problems <= {"teacher", "gradient", "levels"}
    looked_at = {"switches", "data", "classes", "inheriting", "adapter", "scale", "loss", "gradient", "levels"}
    assert looked_at | {"memory", "loader", "time"} <= {one.check for one in found}
    with pytest.raises(ValueError, match="batches must be at least 1"):
        next(examine(tiny_recipe(scenes), batches=0))


def scenes_built(scenes):
    recipe = tiny_recipe(scenes)
    data = dataclasses.replace(recipe.data, short_sides=(128,), val_short_side=128, max_side=256, val_batch_size=6)
    return build(dataclasses.replace(recipe, data=data))


def test_wrong_class_map(scenes, trained):
    """Right boxes with permuted classes, which the names alone do not reveal."""
    built, (teacher, _) = scenes_built(scenes), trained
    assert named(check_quality(teacher, built, 1, CPU), "teacher", "ok").startswith("AP ")
    logits = teacher.head.classification_head.cls_logits
    before = [value.detach().clone() for value in (logits.weight, logits.bias)]
    with torch.no_grad():
        for value in (logits.weight, logits.bias):
            value.copy_(value.unflatten(0, (-1, 10)).roll(1, 1).flatten(0, 1))
    try:
        message = named(check_quality(teacher, built, 1, CPU), "teacher")
    finally:
        with torch.no_grad():
            for value, old in zip((logits.weight, logits.bias), before):
                value.copy_(old)
    assert "its class map is wrong" in message and "although the names are" in message


def test_class_tables(scenes, trained, tmp_path):
    """Names in another order, other names, another number: named before anything is built."""
    teacher, names = trained
    recipe = tiny_recipe(scenes, method="icd")
    data = open_data(recipe)[0]

    def look(class_names):
        save_detector(teacher, tmp_path / "t.safetensors", class_names)
        return list(check_classes(dataclasses.replace(recipe, teacher=str(tmp_path / "t.safetensors")), data))

    assert "agree on 10" in named(look(names), "classes", "ok")
    assert f"in another order: label 0 is {names[-1]!r} to it" in named(look(names[::-1]), "classes")
    assert "10 (a, b, c, ...) against 10 of the data" in named(look(list("abcdefghij")), "classes")
    fewer = dataclasses.replace(recipe, detector=dataclasses.replace(recipe.detector, num_classes=7))
    assert "says 7 classes, the data have 10" in named(check_classes(fewer, data), "classes", "warning")
    strict = dataclasses.replace(fewer, data=dataclasses.replace(fewer.data, match_classes=False))
    assert "says 7 classes" in named(check_classes(strict, data), "classes")
    two_stage = dataclasses.replace(recipe, detector=dataclasses.replace(recipe.detector, detector="faster_rcnn"))
    two_stage = dataclasses.replace(two_stage, teacher="asset:scenes-retinanet-teacher.safetensors")
    assert "its pyramid has strides [8, 16" in named(check_classes(two_stage, data), "teacher")
    missing = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root="nowhere"))
    found = list(examine(missing, device="cpu"))
    assert "nowhere" in named(found, "data") and "the run cannot begin" in named(found, "set-up")


def test_loss_swamped_by_one_level(scenes):
    """FGFI's error is not normalised: a level on which the teacher is loud is all the student is taught."""
    recipe = dataclasses.replace(tiny_recipe(scenes, method="fgfi"), method=FGFIConfig(weight=0.01))
    built = build(recipe)
    block = built.module.teacher.detector.neck.layer_blocks[1][0]
    with torch.no_grad():
        block.weight.mul_(3000)
    loader = build_train_loader(built.train_set, batch_size=6, total_steps=1, short_sides=(128,))
    found = list(check_gradients(built, list(loader)))
    assert "P4 alone swamps" in named(found, "levels")
    assert "drowns the detector" in named(found, "gradient")


def test_loss_that_teaches_nothing(scenes):
    recipe = tiny_recipe(scenes, method="fgfi")
    silent = build(dataclasses.replace(recipe, method=FGFIConfig(weight=0.0)))
    found = list(check_gradients(silent, [first_batch(silent)]))
    assert "fgfi_imitation is 0" in named(found, "loss")
    assert "reaches the student's pyramid" in named(found, "gradient")


def test_lgd_and_both_together_are_measured(scenes):
    built = build(tiny_recipe(scenes, method="lgdicd"))
    found = list(check_gradients(built, [first_batch(built)]))
    losses = named(found, "loss", "ok")
    assert "lgd_distill" in losses and "icd_distill" in losses
    assert any(one.check == "gradient" and "P3" in one.message for one in found)


def test_thresholds():
    levels = ["P3", "P4", "P5"]
    good = list(judge_gradients([1, 1, 1], [0.5, 0.3, 0.1], levels))
    assert [one.status for one in good] == ["ok", "ok"] and "P3 33%, P4 23%, P5 9%" in good[0].message
    assert "too weak" in named(judge_gradients([1, 1, 1], [0.005, 0.005, 0.005], levels), "gradient")
    assert "drowns" in named(judge_gradients([1, 1, 1], [50, 50, 50], levels), "gradient")
    assert "P5 alone swamps" in named(judge_gradients([1, 1, 1], [0.01, 0.01, 0.5], levels), "levels")
    assert "P3 makes most" in named(judge_gradients([3, 1, 0.5], [0.5, 0.01, 0.01], levels), "levels", "warning")
    assert named(judge_gradients([1], [1], ["P3"]), "levels", "ok")
    assert [one.status for one in judge_losses({"icd_distill": 0.0, "icd_localisation": 0.0})] == ["problem"]


ICD = get_recipe("scenes-retinanet-icd")
LGD = get_recipe("scenes-faster-rcnn-lgd")
SWITCHES = [
    (dataclasses.replace(ICD, inherit=False), "warning", "inheriting, which is off"),
    (dataclasses.replace(ICD, method_optimizer=None), "warning", "shares the student's optimiser"),
    (dataclasses.replace(ICD, method=ICDConfig(weight=0)), "problem", "ICD's weight is 0"),
    (dataclasses.replace(ICD, method=ICDConfig(detach_fraction=1.0)), "problem", "no step in which the student"),
    (dataclasses.replace(ICD, inherit=False, method=FGFIConfig(weight=0)), "problem", "FGFI's weight is 0"),
    (dataclasses.replace(ICD, method=FGFIConfig(warmup_fraction=0.6, final_fraction=0.4)), "problem", "no step"),
    (dataclasses.replace(LGD, method=LGDConfig(context=False)), "warning", "detach_appearance is published"),
    (dataclasses.replace(LGD, method=LGDConfig(detach_appearance=True)), "warning", "context object"),
    (dataclasses.replace(LGD, backbone_weights=None), "warning", "starts at random"),
    (
        dataclasses.replace(LGD, detector=dataclasses.replace(LGD.detector, frozen_stages=5)),
        "warning",
        "freezes the whole backbone",
    ),
    (
        dataclasses.replace(get_recipe("scenes-mask-rcnn-lgd"), method=LGDConfig()),
        "warning",
        "published with masks",
    ),
    (dataclasses.replace(ICD, method=LGDICDConfig(LGDConfig(final_fraction=1.0))), "problem", "no step"),
]


@pytest.mark.parametrize(("recipe", "status", "message"), SWITCHES, ids=[case[2] for case in SWITCHES])
def test_switches(recipe, status, message):
    assert message in named(check_switches(recipe), "switches", status)


@pytest.mark.parametrize(
    "name", ["coco-retinanet-icd", "coco-faster-rcnn-lgd", "coco-mask-rcnn-lgdicd", "coco-fcos-lgd"]
)
def test_published_recipes_have_every_switch_on(name):
    assert [one.status for one in check_switches(get_recipe(name))] == ["ok"]


def test_start_and_pyramids(scenes, trained):
    """The numbers of inherited tensors; a teacher with too large features for ICD; other channels."""
    built = build(tiny_recipe(scenes, method="icd"))
    teacher = built.module.teacher.detector
    report = named(check_start(built, teacher), "inheriting", "ok") + named(
        check_start(built, teacher), "inheriting", "warning"
    )
    assert "tensors; other shape: neck.inner_blocks.0.0.weight" in report
    batch = first_batch(built)
    with torch.no_grad():
        for block in teacher.neck.layer_blocks:
            block[0].weight.mul_(1000)
    assert "set --method.teacher-scale" in named(check_pyramids(built, batch), "scale", "warning")
    built.module.teacher.detector = trained[0]
    assert "do not start as the teacher's" in named(check_pyramids(built, batch), "adapter", "warning")


def test_little_that_can_be_inherited(scenes, monkeypatch):
    built = build(tiny_recipe(scenes, method="icd"))
    monkeypatch.setattr(doctor, "FEW_INHERITED", 0.99)
    assert "neck and head take from the teacher" in named(
        check_start(built, built.module.teacher.detector), "inheriting"
    )


def test_memory_loader_and_time(scenes, monkeypatch):
    built = build(tiny_recipe(scenes, method="lgd"))
    parts, group = [first_batch(built)], Processes(0, 1, CPU)
    monkeypatch.setattr(doctor, "_memory", lambda device: 10_000)
    found = list(check_cost(built, parts, 30.0, group))
    assert "raise --schedule.accumulate" in named(found, "memory")
    assert "the loader looks like the brake, raise --data.workers above 0" in named(found, "loader", "warning")
    assert "about 3 min for 6 steps" in named(found, "time", "ok")


def test_the_doctor_command_prints_findings(scenes, capsys, monkeypatch):
    found = [Finding("ok", "data", "8 images"), Finding("warning", "loader", "slow [here]")]
    asked = []
    monkeypatch.setattr(doctor, "examine", lambda recipe, **options: asked.append((recipe, options)) or iter(found))
    assert cli.main(["doctor", "scenes-retinanet-lgd", "--batches", "3", "--seed", "4", "--run-dir", "runs/a"]) == 0
    said = capsys.readouterr()
    assert "8 images" in said.out and "slow [here]" in said.out and "1 thing(s) to look at" in said.err
    assert asked[0][0].seed == 4 and asked[0][1]["batches"] == 3
    assert asked[0][1]["run_dir"] == Path("runs/a")
    found.append(Finding("problem", "teacher", "untrained"))
    assert cli.main(["doctor", "scenes-retinanet-lgd"]) == 2
    said = capsys.readouterr()
    assert "PROBLEM" in said.out and "has 1 problem(s)" in said.err
    for arguments, code in ((["doctor"], 2), (["doctor", "--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == code and "usage: fastkd doctor RECIPE" in capsys.readouterr().out
    assert cli.main(["doctor", "--batches"]) == 2 and "RECIPE must be given first" in capsys.readouterr().err
