"""The study's table from run directories: gains are per seed and relative to the right control."""

import dataclasses
import json

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study.rows import PATHS, STUDIES, arguments_of
from fastkd.commands.train import parse
from fastkd.training import get_recipe

SCENES = STUDIES["scenes"]


def write_run(out, recipe, seed, ap, *, method_step=0.2, commit="a" * 40):
    run_dir = study.run_directory(out, recipe, seed)
    run_dir.mkdir(parents=True)
    metrics = {"bbox": {"AP": ap, "AP50": ap + 10, "AP75": ap - 1}, "steps": 600, "batch_size": 16, "seconds": 60.0}
    metrics |= {"commit": commit, "command": "fastkd train x", "torch": "2.14"}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    ledger = {
        "student": {"seconds_per_step": 0.1},
        "with_method": {"seconds_per_step": method_step},
        "extra": {"peak_bytes": 3 * 2**20},
        "extra_with_teacher": {"seconds_per_step": None},
    }
    (run_dir / "ledger.json").write_text(json.dumps(ledger))


@pytest.fixture
def runs(tmp_path):
    for seed, (baseline, inherit, icd) in enumerate([(20.0, 30.0, 33.0), (21.0, 29.0, 34.5)]):
        write_run(tmp_path, "scenes-retinanet-baseline", seed, baseline, method_step=0.1)
        write_run(tmp_path, "scenes-retinanet-inherit", seed, inherit, method_step=0.1)
        write_run(tmp_path, "scenes-retinanet-icd", seed, icd)
    return tmp_path


def test_gains_are_seed_by_seed_against_the_control(runs):
    found = study.read(SCENES, runs, [0, 1, 2])
    rows = {row.run: row for row in SCENES.rows}
    assert study.gains(found, rows["scenes-retinanet-inherit"]) == {0: 10.0, 1: 8.0}
    assert study.gains(found, rows["scenes-retinanet-icd"]) == {0: 3.0, 1: 5.5}


def test_a_missing_control_run_gives_no_gain(runs):
    write_run(runs, "scenes-retinanet-icd", 2, 40.0)
    found = study.read(SCENES, runs, [0, 1, 2])
    assert 2 not in study.gains(found, next(row for row in SCENES.rows if row.run == "scenes-retinanet-icd"))


def test_the_table_tells_unfinished_seeds_and_costs(runs):
    lines = study.table(SCENES, study.read(SCENES, runs, [0, 1, 2]), [0, 1, 2])
    icd = next(line for line in lines if "ICD (inheriting)" in line)
    cells = [cell.strip() for cell in icd.strip("|").split("|")]
    assert cells[1:6] == ["600", "33.0", "34.5", "-", "**33.8**"]
    assert "+3.0, +5.5" in cells and "**+4.2**" in cells and "2.00 x" in cells and "+3 MiB" in cells
    assert len({line.count("|") for line in lines}) == 1


def test_results_are_written_from_what_is_finished(runs, tmp_path):
    target = tmp_path / "results"
    study.write_results("scenes", runs, [0, 1], target, "")
    text = (target / "scenes.md").read_text()
    assert f"6 of {2 * len(SCENES.rows)} runs finished" in text and "aaaaaaaaaaaa" in text
    assert (target / "scenes.png").stat().st_size > 1000 and json.loads((target / "scenes.json").read_text())


def test_recorded_runs_fill_in_and_keep_their_commit(runs, tmp_path):
    write_run(runs, "scenes-retinanet-icd", 2, 40.0, commit="b" * 40)
    study.write_results("scenes", runs, [0, 1, 2], tmp_path / "results", "")
    fresh = tmp_path / "fresh"
    write_run(fresh, "scenes-retinanet-icd", 2, 50.0)
    study.write_results("scenes", fresh, [0, 2], tmp_path / "again", "", tmp_path / "results" / "scenes.json")
    found = json.loads((tmp_path / "again" / "scenes.json").read_text())
    assert {seed: run["AP"] for seed, run in found["scenes-retinanet-icd"].items()} == {"0": 33.0, "2": 50.0}
    assert found["scenes-retinanet-inherit"]["0"]["AP"] == 30.0 and "1" not in found["scenes-retinanet-inherit"]
    assert "3 of the runs were recorded earlier" in (tmp_path / "again" / "scenes.md").read_text()


def test_nothing_finished_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="finished runs"):
        study.write_results("scenes", tmp_path, [0], tmp_path / "results", "")


def test_each_metric_of_a_run_has_a_row_of_its_own(tmp_path):
    for recipe, shift in (("crowd-faster-rcnn-baseline", 0.0), ("crowd-faster-rcnn-lgd", 2.0)):
        write_run(tmp_path, recipe, 0, 50.0 + shift)
        path = study.run_directory(tmp_path, recipe, 0) / "metrics.json"
        metrics = json.loads(path.read_text())
        metrics["bbox"] = {"AP": 50.0 + shift, "MR": 60.0 - shift, "JI": 40.0}
        path.write_text(json.dumps(metrics))
    for method, masks in (("baseline", 30.0), ("lgd", 31.5)):
        write_run(tmp_path, f"scenes-mask-rcnn-{method}", 0, 35.0)
        path = study.run_directory(tmp_path, f"scenes-mask-rcnn-{method}", 0) / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"segm": {"AP": masks, "AP50": 60.0}}))
    study.write_results("detectors", tmp_path, [0], tmp_path / "results", "")
    lines = (tmp_path / "results" / "detectors.md").read_text().splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    assert "| 58.0 |" in rows["Crowd, Faster R-CNN + LGD, MR"] and "**-2.0**" in rows["Crowd, Faster R-CNN + LGD, MR"]
    assert "**+2.0**" in rows["Crowd, Faster R-CNN + LGD, AP"] and "**+0.0**" in rows["Crowd, Faster R-CNN + LGD, JI"]
    assert "| 31.5 |" in rows["Mask R-CNN + LGD, masks"] and "**+1.5**" in rows["Mask R-CNN + LGD, masks"]
    assert (tmp_path / "results" / "detectors.png").stat().st_size > 1000


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_is_a_recipe_and_every_control_a_row(name):
    names = {row.run for row in STUDIES[name].rows}
    for row in STUDIES[name].rows:
        assert get_recipe(arguments_of(row.run)[0]).name == row.run.partition("@")[0]
        assert row.control is None or row.control in names


@pytest.mark.parametrize("name", STUDIES)
def test_rows_that_are_compared_differ_in_the_method_alone(name):
    for row in STUDIES[name].rows:
        recipes = [get_recipe(arguments_of(run)[0]) for run in (row.run, row.control) if run is not None]
        for recipe in recipes[1:]:
            for field in ("detector", "data", "optimizer", "schedule", "backbone_weights", "runtime", "seed"):
                assert getattr(recipe, field) == getattr(recipes[0], field)


def test_rows_of_a_path_differ_in_the_path_alone():
    recipes = {}
    for path in PATHS:
        name, *changes = arguments_of(f"scenes-retinanet-lgd@{path}")
        recipes[path], _ = parse(name, changes)
    reference = recipes["reference"]
    assert (reference.runtime.ops, reference.runtime.precision) == ("reference", "float32")
    assert len({recipe.runtime for recipe in recipes.values()}) == len(PATHS)
    assert {dataclasses.replace(recipe, runtime=reference.runtime) for recipe in recipes.values()} == {reference}
