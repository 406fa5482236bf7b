"""Recipes: complete, consistent with the published numbers, validated, overridable, through JSON and back."""

import dataclasses
import json

import pytest
from tiny_runs import some_recipes

from fastkd.training import all_recipes, get_recipe, parse_cli
from fastkd.training.config import OptimizerConfig, Recipe, Schedule
from fastkd.training.methods import FGFIConfig, ICDConfig, LGDConfig
from fastkd.training.recipes.papers import ROWS
from fastkd.training.schedule import Phase, learning_rate, phase_at, steps_of

DETECTORS = ("retinanet", "fcos", "faster-rcnn", "mask-rcnn", "atss", "poto", "condinst", "solov2")
MASKED = ("mask-rcnn", "condinst", "solov2")


def methods_of(detector, *methods):
    return [method for method in methods if (detector, method) != ("solov2", "fgfi")]


def test_every_promised_recipe_exists():
    names = set(all_recipes())
    assert "scenes-teacher" in names
    for family in ("scenes", "coco"):
        for detector in DETECTORS:
            methods = methods_of(detector, "teacher", "baseline", "inherit", "lgd", "icd", "fgfi")
            assert {f"{family}-{detector}-{method}" for method in methods} <= names


@pytest.mark.parametrize("name", all_recipes())
def test_json_round_trip(name):
    recipe = get_recipe(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("detector", DETECTORS)
def test_scenes_recipes_differ_in_the_method_alone(detector):
    baseline = get_recipe(f"scenes-{detector}-baseline")
    for method in methods_of(detector, "inherit", "lgd", "icd", "fgfi"):
        recipe = get_recipe(f"scenes-{detector}-{method}")
        plain = {"name": baseline.name, "method": None, "teacher": None, "inherit": False, "method_optimizer": None}
        assert dataclasses.replace(recipe, **plain) == baseline
    assert get_recipe(f"scenes-{detector}-lgd").method.use_masks == (detector in MASKED)
    assert get_recipe(f"scenes-{detector}-icd").inherit


@pytest.mark.parametrize("detector", DETECTORS)
def test_scenes_students_and_teachers_share_the_stable_recipe(detector):
    """docs/results/findings.md, "A stable recipe"."""
    students = [f"scenes-{detector}-{m}" for m in methods_of(detector, "baseline", "inherit", "lgd", "icd", "fgfi")]
    for name in (*students, f"scenes-{detector}-teacher", "scenes-resnet34-backbone"):
        found = get_recipe(name).optimizer
        assert (found.kind, found.learning_rate, found.clip_norm, found.warmup) == ("adamw", 1.5e-3, 2.0, 0.1)
    assert get_recipe(f"scenes-{detector}-icd").method_optimizer.clip_norm == 0.01
    begun_at_random = get_recipe("scenes-resnet18-backbone").optimizer
    assert (begun_at_random.learning_rate, begun_at_random.clip_norm, begun_at_random.warmup) == (3e-3, None, 0.05)


def test_crowds_take_the_stable_recipe():
    found = get_recipe("crowd-faster-rcnn-lgd").optimizer
    assert (found.learning_rate, found.clip_norm, found.warmup) == (1.5e-3, 2.0, 0.1)


@pytest.mark.parametrize("detector", DETECTORS)
def test_published_numbers(detector):
    two_stage = "rcnn" in detector
    lgd, icd = (get_recipe(f"coco-{detector}-{m}") for m in ("lgd", "icd"))
    assert lgd.method.context == (not two_stage and detector != "fcos") and lgd.method.detach_appearance == two_stage
    assert (lgd.method.weight, lgd.method.instructive_weight, lgd.method.adapter_query) == (1.0, 1.0, "appearance")
    assert lgd.schedule == Schedule(steps=180_000, batch_size=16)
    assert [steps_of(m, 180_000) for m in lgd.optimizer.milestones] == [120_000, 160_000]
    assert lgd.optimizer.learning_rate == (0.02 if two_stage else 0.01) and lgd.method_optimizer is None
    assert (icd.method.weight, icd.method.max_queries) == ((3.0, 100) if two_stage else (8.0, 300))
    assert icd.method.rho == 5 and icd.method.temperature == 1.0 and icd.inherit and icd.schedule.steps == 90_000
    assert [steps_of(m, 90_000) for m in icd.optimizer.milestones] == [60_000, 80_000]
    own = icd.method_optimizer
    assert (own.kind, own.decay, own.clip_norm) == ("adamw", "cosine", 0.01)
    assert (own.learning_rate, own.weight_decay) == (1e-4, 1e-4)
    for method in methods_of(detector, "fgfi"):
        fgfi = get_recipe(f"coco-{detector}-{method}").method
        assert (fgfi.psi, fgfi.weight) == (0.5, 0.01)
    assert icd.detector.backbone == "resnet50"
    assert get_recipe(f"coco-{detector}-teacher").detector.backbone == "resnet101"


def test_phases_of_the_published_schedules():
    lgd = get_recipe("coco-retinanet-lgd")
    assert phase_at(lgd, 0) == Phase(detach_student=True, train_backbone=False)
    assert phase_at(lgd, 19_999).train_backbone is False and phase_at(lgd, 20_000).train_backbone is True
    assert phase_at(lgd, 29_999).detach_student is True and phase_at(lgd, 30_000) == Phase()
    scratch = dataclasses.replace(lgd, backbone_weights=None)
    assert phase_at(scratch, 0) == Phase(detach_student=True)
    strongest = dataclasses.replace(lgd, method=dataclasses.replace(lgd.method, final_fraction=50 / 180))
    assert phase_at(strongest, 129_999) == Phase() and phase_at(strongest, 130_000) == Phase(distill=False)
    icd = get_recipe("coco-fcos-icd")
    assert phase_at(icd, 999) == Phase(detach_student=True) and phase_at(icd, 1000) == Phase()
    fgfi = get_recipe("coco-fcos-fgfi")
    assert phase_at(fgfi, 999) == Phase(distill=False) and phase_at(fgfi, 1000) == Phase()
    assert phase_at(get_recipe("coco-fcos-baseline"), 5) == Phase(distill=False)


def test_phases_scale_with_the_steps():
    lgd = get_recipe("coco-retinanet-lgd")
    short = dataclasses.replace(lgd, schedule=Schedule(steps=180))
    assert [phase_at(short, s) for s in (19, 20, 29, 30)] == [phase_at(lgd, s * 1000) for s in (19, 20, 29, 30)]


def test_learning_rate():
    config = OptimizerConfig(learning_rate=1.0, warmup=0.1, warmup_factor=0.2, milestones=(0.5, 0.9), gamma=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[5] == pytest.approx(0.6) and rates[10] == 1.0 and rates[49] == 1.0
    assert rates[50] == pytest.approx(0.1) and rates[89] == pytest.approx(0.1) and rates[90] == pytest.approx(0.01)
    cosine = OptimizerConfig(learning_rate=2.0, warmup=0.0, decay="cosine")
    assert learning_rate(cosine, 0, 100) == 2.0 and learning_rate(cosine, 50, 100) == pytest.approx(1.0)
    assert 0 < learning_rate(cosine, 99, 100) < 0.001


def test_command_line_overrides():
    recipe = parse_cli(
        "scenes-retinanet-icd",
        ["--schedule.steps", "100", "--method.weight", "2", "--data.short-sides", "96", "112", "--seed", "5",
         "--data.root", "my data", "--optimizer.clip-norm", "None", "--method-optimizer.learning-rate", "0.5",
         "--detector.width", "0.25", "--no-inherit", "--teacher", "t.safetensors"],
    )  # fmt: skip
    before = get_recipe("scenes-retinanet-icd")
    assert recipe.schedule.steps == 100 and recipe.method.weight == 2.0 and recipe.data.short_sides == (96, 112)
    assert recipe.seed == 5 and recipe.data.root == "my data" and recipe.optimizer.clip_norm is None
    assert recipe.method_optimizer.learning_rate == 0.5 and recipe.detector.width == 0.25 and not recipe.inherit
    assert recipe.teacher == "t.safetensors"
    assert recipe.schedule.batch_size == before.schedule.batch_size and recipe.optimizer.decay == before.optimizer.decay


UNFITTED = [name for name in all_recipes() if not name.startswith("custom-")]  # those need a data set


PARSED = [*(name for name in UNFITTED if name not in ROWS), "coco-fcos-x101-dcn-2x-ss-lgd"]


@pytest.mark.parametrize("name", some_recipes(PARSED, "command line"))
def test_command_line_without_overrides_changes_nothing(name):
    assert parse_cli(name, []) == get_recipe(name)


def test_command_line_errors(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli("scenes-retinanet-lgd", ["--schedule.stops", "3"])
    assert stop.value.code == 2 and "schedule.stops" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        parse_cli("scenes-retinanet-lgd", ["--schedule.steps", "many"])
    assert stop.value.code == 2
    with pytest.raises(ValueError, match="scenes-retinanet-lgd"):
        get_recipe("scenes-retinanet-lgdd")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: Schedule(steps=0), "steps must be at least 1, got 0"),
        (lambda r: Schedule(batch_size=16, accumulate=3), "multiple of accumulate = 3, got 16"),
        (lambda r: OptimizerConfig(learning_rate=0.0), "learning_rate must be positive"),
        (lambda r: OptimizerConfig(kind="adam"), "kind must be 'sgd' or 'adamw', got 'adam'"),
        (lambda r: OptimizerConfig(milestones=(0.9, 0.5)), "milestones must be ascending"),
        (lambda r: OptimizerConfig(warmup=1.5), "warmup must be a fraction"),
        (lambda r: OptimizerConfig(clip_norm=0.0), "clip_norm must be positive or None"),
        (lambda r: LGDConfig(detach_fraction=-0.1), "detach_fraction must be a fraction"),
        (lambda r: LGDConfig(heads=0), "heads must be at least 1"),
        (lambda r: LGDConfig(weight=-1.0), "LGDConfig: weight must be 0 or more"),
        (lambda r: LGDConfig(instructive_weight=-1.0), "instructive_weight must be 0 or more"),
        (lambda r: ICDConfig(temperature=0), "temperature must be positive"),
        (lambda r: FGFIConfig(psi=2), "psi must be in"),
        (lambda r: dataclasses.replace(r.data, short_sides=()), "short_sides must be one or more"),
        (lambda r: dataclasses.replace(r.data, short_sides=(900,), max_side=800), "max_side = 800.*got 900"),
        (lambda r: dataclasses.replace(r.data, workers=-1), "workers must be 0 or more"),
        (lambda r: dataclasses.replace(r.runtime, precision="float16"), "precision must be"),
        (lambda r: dataclasses.replace(r.runtime, keep_last=0), "keep_last must be at least 1"),
        (lambda r: dataclasses.replace(r, method=ICDConfig()), "ICD must have a teacher.*--teacher"),
        (lambda r: dataclasses.replace(r, inherit=True), "inherit must have a teacher"),
        (lambda r: dataclasses.replace(r, teacher="t.safetensors"), "teacher must be None"),
        (lambda r: dataclasses.replace(r, method_optimizer=OptimizerConfig()), "method_optimizer must be None"),
        (lambda r: dataclasses.replace(r, method=LGDConfig(use_masks=True)), "use_masks must be False for retinanet"),
        (lambda r: dataclasses.replace(r, seed=-1), "seed must be 0 or more"),
        (
            lambda r: dataclasses.replace(get_recipe("scenes-solov2-icd"), method=FGFIConfig()),
            "must not be FGFI for solov2",
        ),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        change(get_recipe("scenes-retinanet-baseline"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d["schedule"].update(stops=3), "recipe.schedule .*'stops'"),
        (lambda d: d["data"].pop("root"), "recipe.data .*'root'"),
        (lambda d: d["method"].update(kind="magic"), "recipe.method must be a method"),
        (lambda d: d["schedule"].update(steps="many"), "recipe.schedule.steps must be int, got 'many'"),
        (lambda d: d["schedule"].update(steps=True), "recipe.schedule.steps must be int, got True"),
        (lambda d: d["data"].update(short_sides=8), "recipe.data.short_sides must be a list"),
        (lambda d: d["runtime"].update(precision="fp8"), "recipe.runtime.precision must be one of"),
        (lambda d: d.update(optimizer=None), "recipe.optimizer must be an object, got None"),
    ],
)
def test_damaged_json_is_named(damage, message):
    values = get_recipe("scenes-retinanet-lgd").to_dict()
    damage(values)
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(values)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match=r"get_recipe: name must be .* got 'coco-fcos-lgdd'; nearest: coco-fcos-lgd,"):
        get_recipe("coco-fcos-lgdd")
