"""The protocol of methods: its use by recipes, and no checks for specific methods elsewhere."""

import ast
import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tiny_runs import make_tiny_data, silent, tiny_detector, tiny_recipe

import fastkd
from fastkd import distillers
from fastkd.detectors import build_detector
from fastkd.distillers import LGD, PKD
from fastkd.training import Combined, LGDConfig, OptimizerConfig, PKDConfig, Recipe, Schedule, get_recipe, train
from fastkd.training.build import build
from fastkd.training.doctor.checks import check_gradients, check_switches
from fastkd.training.methods import WITH_RECIPES, Method, Phase, kinds
from fastkd.training.methods.protocol import Given
from fastkd.training.optimizers import build_optimizers
from fastkd.training.parallel.processes import processes
from fastkd.training.run.loading import train_loader
from fastkd.training.schedule import phase_at

ROOT = Path(fastkd.__file__).parent.parent
SHIPPED = [method for method in kinds().values() if method.__module__.startswith("fastkd.")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


@dataclass(frozen=True)
class LGDAndPKD(Combined):
    """A minimal combination of methods other than the shipped one."""

    kind = "test-lgd-pkd"
    label = "LGD + PKD"
    needs_teacher = True

    lgd: LGDConfig = field(default_factory=LGDConfig)
    pkd: PKDConfig = field(default_factory=PKDConfig)
    lgd_optimizer: OptimizerConfig | None = None


def python_files():
    for file in sorted(itertools.chain(ROOT.glob("fastkd/**/*.py"), ROOT.glob("benchmarks/**/*.py"))):
        if not any(file.is_relative_to(ROOT / "fastkd" / room) for room in ("training/methods", "distillers")):
            yield file


def asked(tree):
    """Lines that check for a specific method: isinstance with its classes, comparison with its name."""
    classes = {method.__name__ for method in SHIPPED} | set(distillers.__all__) - {"Distilled", "Distiller"}
    names = {method.kind for method in SHIPPED}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass"):
            parts = ast.walk(node.args[1])
            found = {getattr(part, "id", getattr(part, "attr", None)) for part in parts} & classes
        elif isinstance(node, ast.Compare):
            found = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & names
        else:
            continue
        if found:
            yield node.lineno, found


def test_nobody_asks_which_method_it_holds():
    found = [(str(file), *line) for file in python_files() for line in asked(ast.parse(file.read_text("utf-8")))]
    assert not found
    assert list(asked(ast.parse('isinstance(x, (LGD, int)) or x.method == "icd" or "fgfi" in names'))) != []
    assert len(list(asked(ast.parse('isinstance(x, LGDConfig)\nx == "pkd"\nisinstance(x, int)\nx == "bbox"')))) == 2


def test_kinds_and_labels_are_their_own():
    assert len({method.kind for method in SHIPPED}) == len({method.label for method in SHIPPED}) == len(SHIPPED)
    assert all("-" not in method.kind for method in WITH_RECIPES) and set(WITH_RECIPES) < set(SHIPPED)
    assert kinds()["test-lgd-pkd"] is LGDAndPKD


@pytest.mark.parametrize("method", WITH_RECIPES, ids=lambda method: method.kind)
def test_the_settings_say_what_the_distiller_says(method, scenes):
    """needs_teacher stands in both, for a recipe is checked before anything is built."""
    built = build(tiny_recipe(scenes, "retinanet", method.kind))
    assert built.module.distiller.needs_teacher == method.needs_teacher == (built.module.teacher is not None)
    assert (built.priors is not None) == method.needs_priors
    assert method.from_dict(built.recipe.to_dict()["method"]) == built.recipe.method


def test_a_method_says_what_is_missing():
    student = build_detector(tiny_detector("fcos"))
    with pytest.raises(ValueError, match=r"build: teacher must be given, got None; pass --teacher"):
        PKDConfig().build(Given(student))
    with pytest.raises(ValueError, match="build: priors must be given, got None"):
        _ = Given(student).priors
    with pytest.raises(NotImplementedError, match=r"Method\.build must be implemented"):
        Method().build(Given(student))
    with pytest.raises(ValueError, match="Recipe: method must not be Score-weighted L2 for solov2"):
        dataclasses.replace(
            get_recipe("scenes-solov2-baseline"), method=kinds()["scorel2"](), teacher="asset:scenes-retinanet-teacher"
        )
    with pytest.raises(ValueError, match="LGDAndPKD: lgd must be a LGDConfig, got None"):
        LGDAndPKD(lgd=None)


def test_a_method_that_ends_and_one_that_is_off():
    recipe = get_recipe("scenes-fcos-pkd")
    ends = dataclasses.replace(recipe, method=PKDConfig(final_fraction=0.25), schedule=Schedule(steps=8, batch_size=2))
    assert [phase_at(ends, step).distill for step in range(8)] == [True] * 6 + [False] * 2
    off = dataclasses.replace(recipe, method=PKDConfig(weight=0.0))
    assert ["PKD's weight is 0" in one.message for one in check_switches(off)] == [True]
    never = dataclasses.replace(recipe, method=PKDConfig(final_fraction=1.0))
    assert any("no step in which the student is taught" in one.message for one in check_switches(never))


def test_two_other_methods_on_one_student(scenes, tmp_path):
    """A combination that is not ours: names of its parts, optimisers, phases, a whole run, its recipe read back."""
    rate = OptimizerConfig(learning_rate=0.01)
    method = LGDAndPKD(LGDConfig(heads=4, final_fraction=0.5), PKDConfig(weight=1.0), rate)
    recipe = tiny_recipe(scenes, "retinanet", "pkd", schedule=Schedule(steps=4, batch_size=2))
    recipe = dataclasses.replace(recipe, method=method)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert phase_at(recipe, 0).of("pkd") == Phase() and phase_at(recipe, 3).of("lgd").distill is False
    assert method.scaled(2.0).lgd_optimizer.learning_rate == 0.02
    built = build(recipe)
    assert isinstance(built.module.distiller["lgd"], LGD) and isinstance(built.module.distiller["pkd"], PKD)
    assert {one.name: len(one.parameters) > 0 for one in build_optimizers(recipe, built.module)} == {
        "student": True,
        "lgd": True,
    }
    result = train(recipe, tmp_path / "run", device="cpu", console=silent())
    assert result.exit_code == 0


def test_the_doctor_on_a_method_without_parameters(scenes):
    built = build(tiny_recipe(scenes, "retinanet", "pkd"))
    assert not list(built.module.distiller.parameters())
    findings = list(check_gradients(built, [first_batch(built)]))
    assert any(one.check == "loss" and "pkd_distill" in one.message for one in findings)


def first_batch(built):
    with processes("cpu") as group:
        return next(iter(train_loader(built, group, parts=1)))
