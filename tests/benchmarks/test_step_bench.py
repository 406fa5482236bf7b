"""The step benchmark: measurements, arithmetic, report. No whole step of a ResNet-50 is run here."""

import copy
import dataclasses
import json
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from benchmarks.step import __main__ as step
from benchmarks.step import candidates as step_candidates
from benchmarks.step import measure as step_measure
from benchmarks.step import own as step_own
from benchmarks.step import rates as step_rates
from benchmarks.step import results as step_results
from benchmarks.step.candidates import FORMS, OPTIONS, Candidate, Problem, recipe_of
from benchmarks.step.dispatch_ledger import Counts, count


def ledger(ops, size, peak=0):
    return dataclasses.asdict(Counts(ops=ops, bytes_read=size, flops=10**9, peak=peak))


def entry(seconds, ops=10, size=10**9, peak=100, convolutions=0, **more):
    found = {"seconds": [seconds, seconds + 1], "ledger": ledger(ops, size, peak) | {"convolutions": convolutions}}
    return {**found, "transient_bytes": 2**20, "resident_bytes": 2**21, **more}


ENTRIES = {
    "student/plain": entry(2.0),
    "student/float32": entry(1.0),
    "student/bfloat16": entry(0.5, convolutions=4 * 10**8),
    "lgd/plain": entry(6.0, ops=1010, size=5 * 10**9, peak=300),
    "lgd/float32": entry(3.0, ops=360, size=3 * 10**9, peak=250),
    "icd/plain": entry(4.0, teacher_ledger=ledger(1, 1)),
    "icd/float32": entry(4.0, teacher_ledger=ledger(1, 1)),
    "icd/plain-bfloat16": entry(1.5, teacher_ledger=ledger(1, 1)),
    "icd/bfloat16": entry(0.6, teacher_ledger=ledger(1, 1)),
    "fgfi/float32": entry(2.0),
    "teacher/float32": entry(5.0),
}
ROW = {**dataclasses.asdict(Problem()), "entries": ENTRIES}
ALONE = {
    "problem": dataclasses.asdict(Problem()),
    "entries": {
        "plain": {"seconds": [1.0, 1.2], "ledger": ledger(500, 8 * 10**9, 1000), "transient_bytes": 1000},
        "float32": {"seconds": [0.1], "ledger": ledger(130, 10**9, 100), "transient_bytes": 100},
    },
}
SAVED = {
    "command": "python -m benchmarks.step",
    "commit": "abc",
    "machine": {"cpu": "a cpu", "torch": "2"},
    "threads": 2,
    "seconds": 61.0,
    "icd_alone": ALONE,
    "rates": {name: {"convolutions": 4e9, "products": 6e9} for name in ("float32", "bfloat16")},
    "rows": [ROW],
    "skipped": [dataclasses.asdict(Problem(images=2))],
}


def line(text, start):
    (found,) = [row for row in text.splitlines() if row.startswith(f"| {start} |")]
    return [cell.strip() for cell in found.removeprefix("|").removesuffix("|").split("|")][1:]


def test_the_report_compares_with_plain_and_with_the_targets(tmp_path):
    text = step_results.report(SAVED)
    assert line(step_results.row_table(ROW), "LGD")[:2] == ["6.00 s", "3.00 s (2.00 x)"]
    assert line(text, "student alone")[3:] == ["0.50 s", "3 MiB", "3 MiB", "", "3 MiB"]
    aims = step_results.targets(ROW)
    assert line(aims, "LGD, ours float32")[:3] == ["1.4 x faster", "2.00 x", "yes"]
    assert line(aims, "ICD, ours float32")[:3] == ["1.25 x faster", "1.00 x", "no"]
    assert line(aims, "ICD, ours bfloat16")[:3] == ["2.2 x faster", "2.50 x", "yes"]  # over plain bfloat16
    assert line(step_results.row_table(ROW), "ICD")[:4] == ["4.00 s", "4.00 s (1.00 x)", "1.50 s", "0.60 s (2.50 x)"]
    beside = step_results.step_ratios(ROW, SAVED["rates"])
    assert beside in text and "bfloat16: convolutions 4, products 6 GFLOP/s" in text
    assert line(beside, "ICD, ours bfloat16") == ["1.20 x", "<= 1.5 x: yes", "0", "1", "28%"]  # 1 / 6 of 0.6 s
    assert line(beside, "student alone, ours bfloat16")[2:] == ["0", "1", "40%"]  # 0.4 / 4 + 0.6 / 6 of 0.5 s
    assert line(step_results.step_ratios(ROW, None), "LGD, ours float32") == ["3.00 x", "", "", "", ""]
    own = "LGD's own part, ours float32"
    assert line(text, f"{own}: bytes") == ["1/2 of plain's", "2.00 GB (plain 4.00 GB)", "yes"]
    assert line(text, f"{own}: extra peak memory")[2] == "no"
    assert line(text, "ICD's own part, ours float32: time") == ["5 x faster", "10.0 x", "yes"]
    assert line(text, "ICD's own part, ours float32: bytes")[2] == "yes"
    cost = step_results.fgfi_ledger(ROW)
    assert line(cost, "FGFI") == ["1.00 s", "5.00 s", "6.00 s"] and "67% lower" in cost and cost in text  # 1 - 2 / 6
    assert "Not measured, time or memory was over: RetinaNet-R50, B = 2" in text
    step_results.plot(SAVED, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 1000


def test_the_readme_quotes_the_first_problem_of_each_detector(tmp_path, capsys):
    row = copy.deepcopy(ROW)
    row["entries"] |= {f"{method}/plain-bfloat16": entry(3.0) for method in ("student", "lgd")}
    row["entries"] |= {f"{method}/bfloat16": entry(2.0) for method in ("student", "lgd")}
    del row["entries"]["icd/bfloat16"]
    (tmp_path / "step.json").write_text(json.dumps({**SAVED, "rows": [row, {**row, "images": 2}]}))
    assert step.main(["--quote", str(tmp_path / "step.json")]) == 0
    text = capsys.readouterr().out
    seconds = ["6.00 s", "3.00 s (**2.00 x**)", "3.00 s", "2.00 s (**1.50 x**)"]
    assert line(text, "RetinaNet-R50, LGD")[:4] == seconds
    assert "ICD" not in text  # its step in bfloat16 was not measured


def test_the_teachers_forward_is_no_part_of_icd():
    row = copy.deepcopy(ROW)
    row["entries"]["icd/plain"] = entry(4.0, ops=50, size=10**10, teacher_ledger=ledger(15, 2 * 10**9))
    found = step_results.own_part(row, "icd", "plain")
    assert (found.ops, found.bytes) == (50 - 10 - 15, 7 * 10**9)
    assert step_results.own_part(row, "lgd", "bfloat16") is None


def test_what_is_measured_and_in_which_order():
    chosen = step.parse(["--quick"])
    assert [dataclasses.astuple(problem)[:3] for problem in step.problems(chosen)] == [("retinanet", 1, 7)]
    everything = step.parse([])
    found = [(problem.boxes, problem.images, problem.detector) for problem in step.problems(everything)]
    assert found[:3] == [(7, 1, "retinanet"), (7, 1, "faster-rcnn"), (7, 2, "retinanet")] and len(found) == 8
    assert str(everything.out) == "docs/results" and str(chosen.out) == "build/bench"
    methods, forms = everything.methods, everything.forms
    assert ("fgfi", "float32") in step_measure.candidates(methods, forms, lone=True, tried=False)
    assert len(step_measure.candidates(methods, forms, lone=False, tried=False)) == 12
    found = step_measure.candidates(methods, forms, lone=True, tried=True)
    assert len(found) == len(set(found)) == 12 + 2 + 5 and ("icd", "compile") in found


def test_options_stand_beside_the_step_they_change():
    row = copy.deepcopy(ROW)
    row["entries"] |= {
        "lgd/bfloat16": entry(2.0),
        "lgd/recompute": entry(2.5, peak=50),
        "lgd/compile": {"seconds": [1.5], "transient_bytes": 2**20, "resident_bytes": 2**22},
    }
    options = step_results.options_table(row)
    assert line(options, "LGD") == ["2.00 s", "2.50 s", "1.50 s", "3 MiB", "3 MiB", "5 MiB"]
    assert "student" not in options and not step_results.options_table(ROW)
    report = step_results.report({**SAVED, "rows": [row]})
    assert options in report and line(report, "LGD, and --runtime.recompute")
    assert "LGD, and --runtime.compile" not in report  # not counted


@pytest.mark.parametrize("option", [pytest.param(x, marks=[pytest.mark.long] * (x == "compile")) for x in OPTIONS])
def test_options_are_built_as_the_trainer_builds_them(option, monkeypatch):
    problem = Problem(images=1, boxes=1, height=64, width=64)
    recipe = recipe_of("retinanet", "lgd", option)
    small = dataclasses.replace(recipe.detector, backbone="resnet18", channels=16)
    monkeypatch.setattr(step_candidates, "recipe_of", lambda *_: dataclasses.replace(recipe, detector=small))
    candidate = step_candidates.build(problem, "lgd", option)
    assert candidate.compiled == candidate.module.regions.enabled == (option == "compile")
    assert recipe.runtime.recompute == (option == "recompute") and recipe.runtime.precision == "bfloat16"
    candidate.module.regions.backend = "aot_eager"
    candidate.step()
    found = step_measure.first_turn(candidate)
    assert found["transient_bytes"] > 0 and ("ledger" in found) == (option != "compile")


def test_problems_join_a_saved_run():
    slower = {**ROW, "entries": {"student/plain": entry(9.0)}}
    new = {**SAVED, "command": "later", "commit": "def", "rows": [slower, {**ROW, "images": 2}], "icd_alone": None}
    both = step.together({**SAVED, "rows": [ROW, {**ROW, "boxes": 30}]}, {**new, "skipped": []})
    assert [(row["images"], row["boxes"]) for row in both["rows"]] == [(1, 7), (2, 7), (1, 30)]
    assert both["rows"][0] is slower and both["skipped"] == [] and both["icd_alone"] is ALONE
    assert (both["command"], both["commit"]) == ("python -m benchmarks.step` and `later", "abc and def")
    assert both["seconds"] == 122.0
    assert step.together(both, {**new, "skipped": []})["commit"] == "abc and def"


def test_a_counted_turn_and_a_turn_on_other_images():
    weight = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1, momentum=0.9)

    def update():
        optimizer.step()
        optimizer.zero_grad()

    batch = Problem(images=1, boxes=1, height=8, width=8).batch()
    sizes = []

    def forward(batch):
        sizes.append(batch.padded_size)
        return {"loss": weight(batch.images.flatten()[:4]).sum()}

    candidate = Candidate(forward, [optimizer], update, weight, None, None, batch)
    candidate.on(Problem(height=16, width=24).batch(), candidate.step)
    assert sizes == [(16, 24)]
    found = step_measure.first_turn(candidate)
    assert sizes[1:] == [(8, 8)] and len(found["seconds"]) == 1 and found["ledger"]["by_op"]["aten::mm"] >= 1
    assert found["resident_bytes"] == 2 * 4 * (16 + 4)  # weights and momenta
    assert found["transient_bytes"] >= 4 * (16 + 4) and candidate.timed() > 0


@pytest.mark.parametrize("form", FORMS)
def test_icd_alone(form):
    problem = Problem(images=2, boxes=2, height=64, width=96)
    found = step_own.measure(problem, [form], 1, channels=16)["entries"][form]
    assert len(found["seconds"]) == 1 and found["ledger"]["ops"] > 100 and found["transient_bytes"] > 0
    assert ("fastkd::value_mimic" in found["ledger"]["by_op"]) == (not form.startswith("plain"))


def test_the_machines_rates():
    found = step_rates.measure(quick=True, repetitions=2)
    assert set(found) == {"float32", "bfloat16"}
    assert all(rate > 1e6 for kinds in found.values() for rate in kinds.values())
    assert step_rates.least_seconds(30, 10, {"convolutions": 5, "products": 4}) == 10 / 5 + 20 / 4


def test_the_ledger_names_convolutions():
    level, weight = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 1, 1)
    found = count(lambda: torch.nn.functional.conv2d(level, weight).flatten(2) @ torch.randn(1, 16, 5))
    assert (found.convolutions, found.flops) == (2 * 16 * 6, 2 * 16 * 6 + 2 * 3 * 16 * 5)


@pytest.mark.parametrize("method", ["student", "icd"])
def test_plain_bfloat16_is_channels_last_under_autocast(method):
    candidate = step_candidates.build(Problem(images=1, boxes=1, height=64, width=64), method, "plain-bfloat16")
    assert candidate.batch.images.is_contiguous(memory_format=torch.channels_last)
    weights = [p for p in candidate.module.parameters() if p.dim() == 4]
    assert all(p.dtype == torch.float32 and p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    if method == "icd":
        assert {level.dtype for level in candidate.teacher()} == {torch.bfloat16}
    losses = candidate.forward(candidate.batch)
    assert all(loss.isfinite() for loss in losses.values())


def test_a_problem_that_ends_its_process_loses_no_other(monkeypatch):
    def measured(problem, *_, **__):
        if problem.detector == "faster-rcnn":
            raise BrokenProcessPool
        return {**dataclasses.asdict(problem), "entries": ENTRIES}

    monkeypatch.setattr(step, "measure_apart", measured)
    monkeypatch.setattr(step_rates, "measure", lambda: None)
    written = []
    chosen = step.parse(["--images", "1", "--boxes", "7", "--methods", "student"])
    found = step.collect(chosen, None, lambda saved: written.append(copy.deepcopy(saved)))
    assert [row["detector"] for row in written[-1]["rows"]] == ["retinanet"]
    assert [row["detector"] for row in found["skipped"]] == ["faster-rcnn"]
