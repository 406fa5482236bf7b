"""The cost ledger: what is counted, that measuring changes nothing, and the arithmetic."""

import dataclasses
import json

import pytest
import torch
from tiny_runs import assert_same_run, everything, make_tiny_data, silent, tiny_detector, tiny_recipe

from fastkd.data import build_train_loader
from fastkd.detectors import build_detector, save_detector
from fastkd.training import train
from fastkd.training.build import build, open_data
from fastkd.training.config import RuntimeConfig, Schedule
from fastkd.training.cost import ledger
from fastkd.training.cost.memory import transient_peak
from fastkd.training.methods import FGFIConfig
from fastkd.training.parallel.processes import Processes

CPU = torch.device("cpu")
ONE = Processes(0, 1, CPU)
KIB = 1024


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


def test_memory_of_known_work():
    def work():
        a = torch.ones(256)  # 1 KiB
        b = a.view(16, 16)[2:]  # a view costs nothing
        c = torch.ones(512) * 2  # 2 KiB, and 2 KiB for the factor, gone at once
        del c
        d = torch.ones(768)  # 3 KiB
        d.add_(1)
        return b, d

    assert transient_peak(work, CPU) == 5 * KIB


def test_memory_of_forward_and_backward():
    weight = torch.ones(256, requires_grad=True)

    def work():
        x = weight * 2.0  # 1 KiB
        y = x.exp()  # 1 KiB, kept for backward
        y.sum().backward()

    peak = transient_peak(work, CPU, known=[weight])
    assert 3 * KIB <= peak <= 5 * KIB and weight.grad is not None
    assert transient_peak(lambda: weight.detach().view(-1).add_(0), CPU, known=[weight]) == 0


def measured(data, method, **changes):
    recipe = tiny_recipe(data, method=method, **changes)
    recipe = dataclasses.replace(recipe, runtime=dataclasses.replace(recipe.runtime, ledger_pairs=2))
    built = build(recipe)
    module = built.module.train()
    loader = build_train_loader(
        built.train_set, batch_size=2, total_steps=2, short_sides=(64,), max_side=96, divisor=32, workers=0
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainable = frozenset(name for name, _ in module.named_parameters())
    result = ledger.measure(recipe, module, trainable, [[batch] for batch in loader], ONE)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters()) and module.training
    return recipe, module, result


@pytest.mark.parametrize("method", ["lgd", "icd", "fgfi"])
def test_a_method_costs_memory(tiny_data, method):
    _, module, result = measured(tiny_data, method)
    for row in ("student", "with_method"):
        assert len(result[row]["samples"]) == 2 and min(result[row]["samples"]) > 0
    own = sum(p.numel() * p.element_size() for p in module.distiller.parameters())
    if module.teacher is not None:
        own += sum(p.numel() * p.element_size() for p in module.teacher.detector.parameters())
    assert result["extra"]["peak_bytes"] > own
    weights = sum(p.numel() * p.element_size() for p in module.detector.parameters())
    assert result["student"]["peak_bytes"] > 3 * weights  # weights, gradients, momentum
    assert json.loads(json.dumps(result)) == result
    assert result["extra"]["ratio"] > 0 and result["extra"]["ratio_interval"] is None  # of two pairs


def test_without_a_method_there_is_nothing_extra(tiny_data):
    recipe, _, result = measured(tiny_data, "baseline")
    assert result["extra"] == {"seconds_per_step": 0.0, "peak_bytes": 0}
    whole = ledger.totals(recipe, result)
    assert whole["teacher"] is None and whole["extra_with_teacher"]["seconds"] == 0.0 and whole["method"] is None


FAKE = {
    "student": {"seconds_per_step": 2.0, "peak_bytes": 3 * 2**20},
    "with_method": {"seconds_per_step": 2.5, "peak_bytes": 5 * 2**20},
    "extra": {"seconds_per_step": 0.5, "seconds_interval": [0.4, 0.6], "peak_bytes": 2 * 2**20},
}


@pytest.mark.parametrize(("beside", "name"), [(True, "teacher.json"), (False, "metrics.json")])
def test_totals_with_the_teachers_training(tiny_data, tmp_path, beside, name):
    path = tmp_path / "teacher.safetensors"
    recipe = tiny_recipe(tiny_data)
    save_detector(build_detector(tiny_detector("retinanet")), path, open_data(recipe)[0].class_names)
    method = FGFIConfig(warmup_fraction=0.1, final_fraction=0.2)
    recipe = dataclasses.replace(
        recipe, method=method, teacher=str(path), schedule=Schedule(steps=100, batch_size=2), name="x"
    )
    unknown = ledger.totals(recipe, FAKE)
    assert unknown["extra_with_teacher"] == {"seconds": None, "seconds_per_step": None, "interval": None}
    assert "unknown" in table_text(recipe, unknown)
    (tmp_path / name).write_text(json.dumps({"steps": 500, "seconds": 1000.0}))
    whole = ledger.totals(recipe, FAKE)
    run = {"steps": 100, "distilled_steps": 70, "student_seconds": 200.0, "extra_seconds": 35.0}
    assert whole["run"] == run | {"extra_interval": [28.0, 42.0]}
    assert whole["teacher"] == {"file": str(path), "steps": 500, "seconds": 1000.0}
    assert whole["extra_with_teacher"] == {"seconds": 1035.0, "seconds_per_step": 10.35, "interval": [1028.0, 1042.0]}
    text = table_text(recipe, whole)
    for part in ("2.000", "2.500", "+0.500", "+10.350", "3 MiB", "5 MiB", "+2 MiB", "200 s", "235 s", "+35 s"):
        assert part in text, part
    for part in ("+1,035 s", "+0.400 .. +0.600", "+28 .. +42 s"):
        assert part in text, part


def table_text(recipe, whole) -> str:
    console = silent()
    console.print(ledger.ledger_table(recipe.name, whole))
    return console.file.getvalue()


@pytest.mark.parametrize("method", ["baseline", "icd"])
def test_measuring_leaves_the_run_as_it_is(tiny_data, tmp_path, method):
    recipe = tiny_recipe(tiny_data, method=method, runtime=RuntimeConfig(precision="float32", ledger_pairs=0))
    with_ledger = dataclasses.replace(recipe, runtime=dataclasses.replace(recipe.runtime, ledger_pairs=2))
    train(recipe, tmp_path / "without", device="cpu", console=silent())
    train(with_ledger, tmp_path / "with", device="cpu", console=silent())
    assert_same_run(everything(tmp_path / "without"), everything(tmp_path / "with"))
    assert not (tmp_path / "without/ledger.json").exists()
    stored = json.loads((tmp_path / "with/ledger.json").read_text())
    assert stored["method"] == (None if method == "baseline" else "icd") and stored["run"]["steps"] == 6


def test_a_failing_step_leaves_the_compiled_functions(tiny_data):
    recipe = tiny_recipe(tiny_data, method="lgd")
    module = build(recipe).module
    trainable = frozenset(name for name, _ in module.named_parameters())
    candidate = ledger._Candidate(recipe, module, trainable, ONE, method=True)
    with pytest.raises(AttributeError):
        candidate.peak([None], channels_last=False)
    assert candidate.module.regions is module.regions
