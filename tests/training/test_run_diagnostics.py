"""The diagnostics of a run: values in the log, AP of the teachers, findings of the doctor, section of the report."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import torch
from draws import few
from tiny_runs import make_tiny_data, silent, tiny_recipe

from fastkd.data import build_eval_loader
from fastkd.distillers import ICD
from fastkd.evaluation import evaluate, evaluator_of
from fastkd.report import write_report
from fastkd.training import LGDConfig, train
from fastkd.training.build import build
from fastkd.training.config import RuntimeConfig, Schedule
from fastkd.training.doctor.median_box import MedianBox, median_box
from fastkd.training.doctor.teaching import check_boxes, check_teaching
from fastkd.training.methods import FGFIConfig, ICDConfig, LGDICDConfig, Phase, PKDConfig, kinds
from fastkd.training.parallel.processes import processes
from fastkd.training.run import finish
from fastkd.training.run.checkpoint import load_checkpoint
from fastkd.training.run.diagnostics import InstructiveDetector, StepDiagnostics
from fastkd.training.run.loading import train_loader
from fastkd.training.step import sum_losses

FLOAT = RuntimeConfig(precision="float32", log_every=2, checkpoint_every=6, ledger_pairs=0)
ALWAYS = LGDConfig(heads=4, instructive_weight=0.25, detach_fraction=0.0, freeze_fraction=0.0)
TEACHES = ("icd", "fgfi", "pkd", "cwd", "scorel2")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


def first_batch(built):
    with processes("cpu") as group:
        return next(iter(train_loader(built, group, parts=1)))


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def measured(module, batch, phase=None):
    """The figures of one forward pass."""
    module.measures = True
    losses = module(batch, phase or Phase())
    sums = StepDiagnostics()
    sums.add(module.diagnostics)
    return losses, sums.take(lambda values: values)


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "faster-rcnn", "solov2"])
def test_gap_is_the_difference_of_the_unweighted_losses(scenes, kind):
    recipe = tiny_recipe(scenes, kind, "lgd")
    built = build(dataclasses.replace(recipe, method=ALWAYS))
    module, batch = built.module.eval(), first_batch(built)
    losses, found = measured(module, batch)
    with torch.no_grad():
        pyramid = module.detector.features(batch.images)
        student = module.detector.loss(pyramid, batch)
        taught = module.detector.loss(module.distiller.instruct(pyramid, batch), batch)
    assert len(student) >= 2
    for name, value in student.items():
        assert found[f"instructive_loss_{name}"] == pytest.approx(float(taught[name]), rel=1e-3, abs=1e-5)
        assert found[f"gap_{name}"] == pytest.approx(float(value - taught[name]), rel=2e-3, abs=2e-4)
        assert float(losses[f"instructive_{name}"].detach()) == pytest.approx(0.25 * float(taught[name]), rel=1e-3)
    assert found["gap"] == pytest.approx(sum(found[f"gap_{name}"] for name in student), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ["lgdicd", "scorel2", "fgfi"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_measuring_changes_neither_losses_nor_gradients(scenes, method, dtype):
    built = build(tiny_recipe(scenes, method=method))
    module, batch, found = built.module.train(), first_batch(built), []
    module.dtype = dtype
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for measures in (False, True):
        module.load_state_dict(state)
        module.measures = measures
        module.zero_grad()
        losses = module(batch, Phase())
        sum_losses(losses).backward()
        found.append(
            {
                **{name: value.detach() for name, value in losses.items()},
                **{name: parameter.grad for name, parameter in module.named_parameters()},
                **{name: value.clone() for name, value in module.state_dict().items()},
            }
        )
        assert bool(module.diagnostics) == measures
    for name, value in found[0].items():
        assert (value is None and found[1][name] is None) or torch.equal(value, found[1][name]), name


def test_figures_of_micro_batches_and_processes():
    """Sums are added before they are divided; what no object defines is left out."""
    sums = StepDiagnostics()
    for total, number in ((3.0, 4.0), (1.0, 0.0)):
        sums.add({"a": (torch.tensor(total), torch.tensor(number)), "none": (torch.zeros(()), torch.zeros(()))})
    other = torch.tensor([[6.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert sums.take(lambda values: (values + other) / 2) == {"a": pytest.approx(10 / 5)}
    assert sums.take(lambda values: values) == {}


def test_names_of_several_methods(scenes):
    built = build(tiny_recipe(scenes, method="lgdicd"))
    _, found = measured(built.module.eval(), first_batch(built))
    assert {name.split(".")[0] for name in found} == {"lgd", "icd"}
    assert {"lgd.gap", "lgd.gap_classification", "icd.imitation_error", "icd.inside_boxes"} <= found.keys()
    off = Phase(parts=(("lgd", Phase(distill=False)), ("icd", Phase())))
    _, found = measured(built.module, first_batch(built), off)
    assert {name.split(".")[0] for name in found} == {"icd"}


@functools.cache
def run_of(scenes, folder, method):
    """A run of six steps that is evaluated after the fourth."""
    recipe = tiny_recipe(scenes, method=method, runtime=dataclasses.replace(FLOAT, eval_every=4, checkpoint_every=4))
    if method == "lgd":  # a random head rarely reaches the usual threshold
        detector = dataclasses.replace(recipe.detector, score_threshold=0.001)
        recipe = dataclasses.replace(recipe, method=ALWAYS, detector=detector)
    else:
        recipe = dataclasses.replace(recipe, teacher="asset:scenes-retinanet-teacher.safetensors", inherit=False)
    run = folder / method
    train(recipe, run, device="cpu", console=silent())
    return recipe, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def direct_ap(recipe, detector):
    """AP of a detector on the recipe's validation set."""
    built, data = build(recipe), recipe.data
    loader = build_eval_loader(
        built.val_set,
        batch_size=data.val_batch_size,
        short_side=data.val_short_side,
        max_side=data.max_side,
        divisor=data.divisor,
    )
    detector = detector.eval().to(memory_format=torch.channels_last)
    return evaluate(detector, loader, evaluator_of(built.val_set), progress=False)["bbox"]["AP"]


@pytest.mark.parametrize("method", few(TEACHES))
def test_a_run_with_a_teacher(scenes, folder, method):
    recipe, run = run_of(scenes, folder, method)
    lines, metrics = log_of(run), json.loads((run / "metrics.json").read_text())
    teacher_ap = direct_ap(recipe, build(recipe).module.teacher.detector)
    assert [line["step"] for line in lines] == [2, 4, 4, 6] and teacher_ap > 0
    for line in (lines[0], lines[1], lines[3]):
        assert line["diagnostics"]["imitation_error"] > 0
    assert lines[2]["diagnostics"] == metrics["diagnostics"] == {"teacher_AP": pytest.approx(teacher_ap, abs=1e-6)}
    kept = json.loads((run / "teacher.json").read_text())
    assert kept["bbox"]["AP"] == lines[2]["diagnostics"]["teacher_AP"] and kept["bbox"]["images"] == 6
    assert kept["teacher_sha256"] == build(recipe).teacher_sha256


def test_a_run_of_lgd(scenes, folder):
    recipe, run = run_of(scenes, folder, "lgd")
    lines, metrics = log_of(run), json.loads((run / "metrics.json").read_text())
    assert [line["step"] for line in lines] == [2, 4, 4, 6] and not (run / "teacher.json").exists()
    assert all(line["diagnostics"].keys() >= {"gap", "gap_classification"} for line in (*lines[:2], lines[3]))
    for step, found in ((4, lines[2]["diagnostics"]), (6, metrics["diagnostics"])):
        module = build(recipe).module
        module.load_state_dict(load_checkpoint(run / "checkpoints" / f"step_{step:07}").model)
        expected = direct_ap(recipe, InstructiveDetector(module.detector, module.distiller))
        assert found == {"instructive_AP": pytest.approx(expected, abs=1e-4)}


def test_the_instructive_detector_uses_the_labels(scenes):
    """Its boxes are those of the head on LGD's pyramid, without masks."""
    recipe = tiny_recipe(scenes, "mask-rcnn", "lgd")
    built = build(dataclasses.replace(recipe, detector=dataclasses.replace(recipe.detector, score_threshold=0.0)))
    assert built.recipe.method.use_masks and built.val_set.with_masks
    module, batch = built.module.eval(), first_batch(built)
    view = InstructiveDetector(module.detector, module.distiller)
    with torch.no_grad():
        pyramid = view.features(batch.images)
        found = view.detect(pyramid, batch)
        expected = module.detector.detect(module.distiller.instruct(pyramid, batch), batch)
        plain = module.detector.detect(pyramid, batch)
    assert len(found[0]) and all(one.masks is None for one in found)
    for one, two in zip(found, expected):
        assert torch.equal(one.boxes, two.boxes) and torch.equal(one.scores, two.scores)
    assert not torch.equal(found[0].scores, plain[0].scores)


def test_masks_are_read_for_validation_where_they_are_needed(scenes):
    boxes = dataclasses.replace(tiny_recipe(scenes, "mask-rcnn", "lgd"), method=LGDConfig())
    assert not build(boxes).val_set.with_masks
    assert LGDICDConfig(LGDConfig(use_masks=True)).needs_masks and not LGDICDConfig().needs_masks


def test_an_evaluation_where_lgd_ends(scenes, tmp_path):
    method = dataclasses.replace(ALWAYS, final_fraction=0.5)
    recipe = dataclasses.replace(tiny_recipe(scenes, method="lgd", runtime=FLOAT), method=method)
    result = train(recipe, tmp_path / "run", device="cpu", console=silent())
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert "bbox" in lines[1] and "instructive_AP" in lines[1]["diagnostics"]
    assert lines[2]["diagnostics"] == lines[3]["diagnostics"] == result.metrics["diagnostics"] == {}


def test_the_teacher_is_evaluated_once(scenes, tmp_path, monkeypatch):
    """A resumed run takes the AP from teacher.json, unless the file is another teacher's."""
    evaluated, original = [], finish.Evaluation.run
    spy = lambda self, detector, **options: evaluated.append(detector) or original(self, detector, **options)  # noqa: E731
    monkeypatch.setattr(finish.Evaluation, "run", spy)
    recipe, run = tiny_recipe(scenes, method="pkd", runtime=dataclasses.replace(FLOAT, eval_every=2)), tmp_path / "run"
    first = train(recipe, run, device="cpu", console=silent())
    assert len(evaluated) == 4  # the student three times
    (run / "metrics.json").unlink()
    assert train(recipe, run, device="cpu", console=silent(), resume=True).metrics["bbox"] == first.metrics["bbox"]
    assert len(evaluated) == 5
    (run / "metrics.json").unlink()
    stale = json.loads((run / "teacher.json").read_text()) | {"teacher_sha256": "0"}
    (run / "teacher.json").write_text(json.dumps(stale))
    again = train(recipe, run, device="cpu", console=silent(), resume=True)
    assert len(evaluated) == 7 and again.metrics["diagnostics"] == first.metrics["diagnostics"]


def test_a_baseline_measures_nothing(scenes, tmp_path):
    result = train(tiny_recipe(scenes), tmp_path / "run", device="cpu", console=silent())
    assert {json.dumps(line["diagnostics"]) for line in log_of(tmp_path / "run")} == {"{}"}
    assert result.metrics["diagnostics"] == {} and not (tmp_path / "run" / "teacher.json").exists()


def said(findings):
    return [(one.status, one.message) for one in findings]


def gap_log(gap, aps=()):
    """A log of LGD in which the student's loss is 1 at the end, and the gap changes linearly to `gap` there."""
    log = [
        {
            "step": step,
            "diagnostics": {"gap": gap * step / 80, "gap_box": gap * step / 80, "instructive_loss_box": 1 - gap},
        }
        for step in (20, 40, 60, 80)
    ]
    return log + [{"step": 80, "bbox": {"AP": ap}, "diagnostics": {"instructive_AP": taught}} for ap, taught in aps]


def test_findings_on_the_gap():
    ((status, text),) = said(LGDConfig().teaching_advice(gap_log(0.2)))
    assert status == "ok" and text.startswith("the student's loss is 1, the instructive pyramid's 0.8 (gap: box +0.2)")
    ((status, text),) = said(LGDConfig().teaching_advice(gap_log(-0.1)))
    assert status == "warning" and "no better than the student" in text and "--method.detach-fraction" in text
    ((status, _),) = said(LGDConfig().teaching_advice(gap_log(0.01)))
    assert status == "warning"
    found = said(LGDConfig().teaching_advice(gap_log(0.2, [(30.0, 41.5), (35.0, 34.0)])))
    assert (
        found[1][0] == "warning" and "instructive AP 34.0, given the labels, against the student's 35.0" in found[1][1]
    )
    later = [*gap_log(0.2, [(30.0, 41.5)]), {"step": 200, "bbox": {"AP": 50.0}}]
    assert said(LGDConfig().teaching_advice(later))[1] == (
        "ok",
        "instructive AP 41.5, given the labels, against the student's 30.0 at step 80",
    )


def teacher_log(first, last, teacher, inside=None):
    figures = {} if inside is None else {"inside_boxes": inside, "inside_if_even": 0.1}
    log = [{"step": s, "diagnostics": {"imitation_error": e, **figures}} for s, e in ((20, first), (40, last))]
    return [*log, {"step": 40, "bbox": {"AP": 30.0}, "diagnostics": {"teacher_AP": teacher}}]


def test_findings_on_a_teacher():
    good = said(ICDConfig().teaching_advice(teacher_log(0.8, 0.2, 40.0, 0.25)))
    assert [status for status, _ in good] == ["ok", "ok", "ok"]
    assert good[0][1] == "the teacher's AP is 40.0, the student's 30.0"
    assert good[1][1].startswith("ICD's imitation error was 0.8 at step 20 and is 0.2 now")
    assert good[2][1].startswith("25% of the weights of ICD's attention lie inside the boxes, 10% would")
    bad = said(FGFIConfig().teaching_advice(teacher_log(0.8, 0.79, 29.0, 0.14)))
    assert [status for status, _ in bad] == ["warning"] * 3
    for (_, text), words in zip(bad, ("train a better teacher", "--method.weight", "--method.psi")):
        assert words in text
    full = [{"step": 20, "diagnostics": {"inside_boxes": 0.92, "inside_if_even": 0.8}}]
    assert said(FGFIConfig().teaching_advice(full))[0][0] == "ok"
    assert (
        said(PKDConfig().teaching_advice([{"step": 20, "diagnostics": {"imitation_error": "x"}, "bbox": None}])) == []
    )


def test_findings_of_two_methods():
    log = [
        {"step": s, "diagnostics": {"icd.imitation_error": 1 / s, "lgd.gap": 0.5, "lgd.instructive_loss_box": 0.5}}
        for s in (20, 40)
    ]
    log.append({"step": 40, "bbox": {"AP": 20.0}, "diagnostics": {"teacher_AP": 35.0, "lgd.instructive_AP": 30.0}})
    found = said(LGDICDConfig().teaching_advice(log))
    assert [status for status, _ in found] == ["ok"] * 4
    assert "the student's loss is 1," in found[0][1] and "instructive AP 30.0" in found[1][1]
    assert "teacher's AP is 35.0" in found[2][1] and "ICD's imitation error" in found[3][1]


def test_the_doctor_reads_a_run(scenes, folder, tmp_path):
    recipe, run = run_of(scenes, folder, "icd")
    found = list(check_teaching(recipe, run))
    assert {one.check for one in found} == {"teaching"} and len(found) == 3
    assert f"{json.loads((run / 'teacher.json').read_text())['bbox']['AP']:.1f}" in found[0].message
    recipe, run = run_of(scenes, folder, "lgd")
    assert any("instructive AP" in one.message and "at step 6" in one.message for one in check_teaching(recipe, run))
    assert list(check_teaching(recipe, tmp_path)) == []
    (tmp_path / "log.jsonl").write_text('{"step": 20, "jumps": 0}\n{"step": 40, "dia')
    assert "has logged no diagnostics of LGD" in next(check_teaching(recipe, tmp_path)).message


def test_the_median_box_by_hand():
    """Three boxes of 20, 40 and 60 pixels in images twice as large as the student sees them."""
    boxes = np.array([[0, 0, 40, 40], [0, 0, 120, 120], [10, 10, 90, 90]], dtype=np.float32)
    sizes = np.full((3, 2), (400, 256))
    found = median_box(boxes, sizes, (128, 256), [], (8, 16, 32))
    assert (found.width, found.height, found.level, found.cells) == (40, 40, "P3", 25)  # 8 strides of P3 are 64 pixels
    anchors = [torch.tensor([[-s, -s, s, s]]) for s in (8.0, 16.0, 32.0)]
    assert median_box(boxes, sizes, (128, 256), anchors, (8, 16, 32)).level == "P4"  # IoU 0.64 with the second
    assert median_box(boxes, sizes, (128, 100), [], (8, 16, 32)).width == 20  # the longer side limits the scale


def test_lgd_asks_for_boxes_of_many_cells(scenes):
    ((status, text),) = said(LGDConfig().box_advice(MedianBox(37.0, 37.0, 8)))
    assert status == "warning" and text.startswith("the median box, 37 x 37 pixels, covers 21 cells of P3: LGD paints")
    assert said(LGDICDConfig().box_advice(MedianBox(56.0, 56.0, 8))) == [
        ("ok", "the median box, 56 x 56 pixels, covers 49 cells of P3")
    ]
    recipe = tiny_recipe(scenes, method="lgd")
    texts = []
    for sides in ((48, 64), (96, 128)):  # the second of two is taken
        data = dataclasses.replace(recipe.data, short_sides=sides, max_side=1000)
        texts += [one.message for one in check_boxes(build(dataclasses.replace(recipe, data=data)))]
    small, large = (re.search("median box, ([0-9]+) x ([0-9]+) pixels", text).groups() for text in texts)
    assert [int(side) for side in large] == pytest.approx([2 * int(side) for side in small], abs=1.1)
    for other in (tiny_recipe(scenes), tiny_recipe(scenes, method="pkd")):
        assert list(check_boxes(build(other))) == []


def test_the_report_shows_the_diagnostics(scenes, folder, tmp_path):
    runs = [run_of(scenes, folder, method)[1] for method in ("lgd", "icd")]
    pictures = tmp_path / "pictures"
    text = write_report(runs, tmp_path / "r.html", images=0, picture_dir=pictures, methods=kinds()).read_text()
    assert "How well the methods taught</h2>" in text and any("diagnostics" in file.name for file in pictures.iterdir())
    assert "icd: the teacher&#x27;s AP is" in text or "icd: the teacher's AP is" in text
    last = log_of(runs[0])[3]["diagnostics"]["gap_classification"]
    assert f"<td>{last:.3g} (step 6)</td>" in text.replace(' class="num"', "")
    assert "instructive AP, %" in text and "imitation error" in text
    plain = write_report(runs, tmp_path / "s.html", images=0).read_text()  # kinds are unknown: figures without findings
    assert "How well the methods taught</h2>" in plain and "imitation error was" not in plain


def test_measuring_takes_only_logged_steps(scenes, tmp_path, monkeypatch):
    called, original = [], ICD.diagnostics
    monkeypatch.setattr(ICD, "diagnostics", lambda self, *a, **o: called.append(1) or original(self, *a, **o))
    recipe = tiny_recipe(scenes, method="icd", schedule=Schedule(steps=7, batch_size=2))
    recipe = dataclasses.replace(recipe, runtime=dataclasses.replace(FLOAT, log_every=3))
    train(recipe, tmp_path / "run", device="cpu", console=silent())
    assert len(called) == len(log_of(tmp_path / "run")) == 3  # steps 3, 6 and the last
