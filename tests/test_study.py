"""The study's table from run directories: gains are seed by seed and against the right control."""

import json

import pytest

from benchmarks import study


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
    found = study.read(runs, [0, 1, 2])
    rows = {row.recipe: row for row in study.ROWS}
    assert study.gains(found, rows["scenes-retinanet-inherit"]) == {0: 10.0, 1: 8.0}
    assert study.gains(found, rows["scenes-retinanet-icd"]) == {0: 3.0, 1: 5.5}


def test_a_missing_control_run_gives_no_gain(runs):
    write_run(runs, "scenes-retinanet-icd", 2, 40.0)
    found = study.read(runs, [0, 1, 2])
    assert 2 not in study.gains(found, next(row for row in study.ROWS if row.recipe == "scenes-retinanet-icd"))


def test_the_table_tells_unfinished_seeds_and_costs(runs):
    lines = study.table(study.read(runs, [0, 1, 2]), [0, 1, 2])
    icd = next(line for line in lines if "ICD (inheriting)" in line)
    cells = [cell.strip() for cell in icd.strip("|").split("|")]
    assert cells[1:6] == ["600", "33.0", "34.5", "-", "**33.8**"]
    assert "+3.0, +5.5" in cells and "**+4.2**" in cells and "2.00 x" in cells and "+3 MiB" in cells
    assert len({line.count("|") for line in lines}) == 1


def test_results_are_written_from_what_is_finished(runs, tmp_path):
    target = tmp_path / "results"
    study.write_results(runs, [0, 1], target, "")
    text = (target / "scenes.md").read_text()
    assert f"6 of {2 * len(study.ROWS)} runs finished" in text and "aaaaaaaaaaaa" in text
    assert (target / "scenes.png").stat().st_size > 1000 and json.loads((target / "scenes.json").read_text())


def test_nothing_finished_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="finished runs"):
        study.write_results(tmp_path, [0], tmp_path / "results", "")


def test_every_row_is_a_recipe_and_every_control_a_row():
    from fastkd.training import get_recipe

    names = {row.recipe for row in study.ROWS}
    for row in study.ROWS:
        assert get_recipe(row.recipe).name == row.recipe
        assert row.control is None or row.control in names


def test_rows_of_a_detector_differ_in_the_method_alone():
    from fastkd.training import get_recipe

    for detector in ("retinanet", "faster-rcnn"):
        recipes = [get_recipe(row.recipe) for row in study.ROWS if f"-{detector}-" in row.recipe]
        for recipe in recipes[1:]:
            for field in ("detector", "data", "optimizer", "schedule", "backbone_weights", "runtime", "seed"):
                assert getattr(recipe, field) == getattr(recipes[0], field)
