"""The study's table from recorded runs: gains are per seed and relative to the right control, no run is made twice."""

import dataclasses
import json

import pytest

from benchmarks.study import records
from benchmarks.study.__main__ import Campaign, main
from benchmarks.study.page import gains, table
from benchmarks.study.rows import CHANGES, PATHS, STUDIES, arguments_of
from fastkd.commands.train import parse
from fastkd.training import get_recipe

SCENES = STUDIES["scenes"]
ROWS = ["scenes-retinanet-baseline", "scenes-retinanet-inherit", "scenes-retinanet-icd"]
APS = {0: (20.0, 30.0, 33.0), 1: (21.0, 29.0, 34.5), 2: (22.0, 31.0, 33.0)}


def write_run(run_dir, ap, *, ledger=True, method_step=0.2, **scores):
    run_dir.mkdir(parents=True)
    metrics = {"bbox": {"AP": ap, "AP50": ap + 10, "AP75": ap - 1}, "steps": 600, "batch_size": 16, "seconds": 60.0}
    metrics |= {"commit": "a" * 40, "command": "fastkd train x", "torch": "2.14", **scores}
    metrics["jumps"] = {"count": 1, "steps": [9], "largest_rise": 0.2}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    if ledger:
        costs = {
            "student": {"seconds_per_step": 0.1},
            "with_method": {"seconds_per_step": method_step},
            "extra": {"peak_bytes": 3 * 2**20},
            "extra_with_teacher": {"seconds_per_step": None},
        }
        (run_dir / "ledger.json").write_text(json.dumps(costs))


class Recorded(Campaign):
    """A campaign whose runs are not trained; `made` holds their names and seeds."""

    def train(self, run_dir, command):
        name, seed = command[0], int(command[command.index("--seed") + 1])
        self.made = [*getattr(self, "made", []), (name, seed)]
        write_run(run_dir, APS[seed][ROWS.index(name)], ledger="--runtime.ledger-pairs" not in command)


@pytest.fixture
def campaign(tmp_path):
    def make(out="machine", seeds=(0, 1), options=()):
        return Recorded("scenes", list(seeds), tmp_path / out, tmp_path / "results", options)

    return make


def make_all(campaign, rows=ROWS):
    campaign.made = []
    for run in campaign.missing(rows):
        campaign.make(run)
    return campaign.made


def test_gains_are_seed_by_seed_against_the_control(campaign):
    first = campaign()
    make_all(first)
    found = records.by_run(first.valid(), [0, 1, 2])
    rows = {row.run: row for row in SCENES.rows}
    assert gains(found, rows["scenes-retinanet-inherit"]) == {0: 10.0, 1: 8.0}
    assert gains(found, rows["scenes-retinanet-icd"]) == {0: 3.0, 1: 5.5}


def test_a_missing_control_run_gives_no_gain(campaign):
    make_all(campaign())
    only = campaign(seeds=(0, 1, 2))
    make_all(only, ["scenes-retinanet-icd"])
    found = records.by_run(only.valid(), [0, 1, 2])
    assert 2 not in gains(found, next(row for row in SCENES.rows if row.run == "scenes-retinanet-icd"))


def test_the_table_tells_unfinished_seeds_intervals_and_costs(campaign):
    first = campaign()
    make_all(first)
    lines = table(SCENES, records.by_run(first.valid(), [0, 1, 2]), [0, 1, 2])
    icd = next(line for line in lines if "inheriting + ICD" in line)
    cells = [cell.strip() for cell in icd.strip("|").split("|")]
    assert cells[1:4] == ["600", "33.0, 34.5, -", "**33.8**"]
    assert "+3.0, +5.5" in cells and "**+4.2 (-11.6 .. +20.1)**" in cells and "2.00 x" in cells and "+3 MiB" in cells
    assert cells[-1] == "2" and len({line.count("|") for line in lines}) == 1


def test_a_recorded_run_is_not_made_again_on_another_machine(campaign, tmp_path):
    first = campaign()
    for run in first.missing(ROWS)[:2]:
        first.make(run)
    text = (tmp_path / "results" / "scenes.md").read_text()
    assert f"(2 of {2 * len(SCENES.runs)} runs finished)" in text and "aaaaaaaaaaaa" in text
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
    other = campaign("another machine")
    assert make_all(other) == [(ROWS[2], 0), *((name, 1) for name in ROWS)]
    assert make_all(campaign("a third")) == []
    assert (tmp_path / "results" / "scenes.png").stat().st_size > 1000
    assert str(tmp_path) not in (tmp_path / "results" / "scenes.json").read_text()


def test_a_run_of_another_recipe_does_not_count(campaign):
    make_all(campaign(options=("--schedule.steps", "5")))
    later = campaign()
    assert later.valid() == []
    with pytest.raises(SystemExit, match="of the present recipes"):
        later.write()
    assert len(make_all(later)) == 6


def test_a_failed_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(SystemExit, match=r"scenes-retinanet-baseline-\w+-seed0 ended with code 1, see .*log"):
        Campaign("scenes", [0], tmp_path / "runs", tmp_path).make((ROWS[0], 0))


def test_a_trial_does_not_write_into_the_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study", "--steps", "4"])
    with pytest.raises(SystemExit):
        main()
    assert "needs --results FOLDER" in capsys.readouterr().err


def test_a_record_depends_on_recipe_and_assets_but_not_on_the_seed():
    plain = records.digest((ROWS[0],))
    assert plain == records.digest((ROWS[0], "--seed", "4")) == records.digest((ROWS[0], "--runtime.ledger-pairs", "0"))
    assert plain != records.digest((ROWS[0], "--optimizer.clip-norm", "3"))


def test_each_metric_of_a_run_has_a_row_of_its_own(tmp_path):
    found = {}
    for recipe, shift in (("crowd-faster-rcnn-baseline", 0.0), ("crowd-faster-rcnn-lgd", 2.0)):
        write_run(tmp_path / recipe, 0, bbox={"AP": 50.0 + shift, "MR": 60.0 - shift, "JI": 40.0})
        found[recipe] = {0: records.result_of(tmp_path / recipe)}
    for method, masks in (("baseline", 30.0), ("lgd", 31.5)):
        write_run(tmp_path / method, 35.0, segm={"AP": masks, "AP50": 60.0})
        found[f"scenes-mask-rcnn-{method}"] = {0: records.result_of(tmp_path / method)}
    lines = table(STUDIES["detectors"], found, [0])
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    assert "| 58.0 |" in rows["Crowd, Faster R-CNN + LGD, MR"] and "**-2.0**" in rows["Crowd, Faster R-CNN + LGD, MR"]
    assert "**+2.0**" in rows["Crowd, Faster R-CNN + LGD, AP"] and "**+0.0**" in rows["Crowd, Faster R-CNN + LGD, JI"]
    assert "| 31.5 |" in rows["Mask R-CNN + LGD, masks"] and "**+1.5**" in rows["Mask R-CNN + LGD, masks"]


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


def test_rows_with_and_without_inheriting_differ_in_it_alone():
    for row in SCENES.rows:
        name, _, change = row.run.partition("@")
        if change in CHANGES:
            recipe, _ = parse(name, CHANGES[change])
            assert recipe.inherit == (change == "inherit") != get_recipe(name).inherit
