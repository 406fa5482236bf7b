"""Fifty mutated files for each reader, what earlier campaigns found, and that the sandbox notices what it should."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import time
import zlib

import pytest

from benchmarks.hostile import grammar, sandbox
from benchmarks.hostile.readers import READERS, coco
from benchmarks.hostile.sandbox import mutated, run
from fastkd import cli
from fastkd.commands.train import find_recipe
from fastkd.data import CocoDataset
from fastkd.evaluation import evaluator_of
from fastkd.evaluation.tables import class_table
from fastkd.report.runs import number
from fastkd.text import printable
from fastkd.training import get_recipe

CASES = 50


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_mutated_files(reader, tmp_path):
    outcomes = dict(run(reader, range(CASES), tmp_path / "data"))
    wrong = {case: outcome["said"] for case, outcome in outcomes.items() if outcome["kind"] == "wrong"}
    assert len(outcomes) == CASES and not wrong
    refused = sum(outcome["kind"] == "refused" for outcome in outcomes.values())
    assert refused > 5 or reader.name in ("odgt", "log")  # most faults of these are in a line, which is left out


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_cases_are_reproducible(reader, tmp_path):
    content = reader.make(tmp_path)
    first, again = ([mutated(reader, n, content) for n in range(20)] for _ in range(2))
    assert first == again and len(set(first)) > 15


@pytest.mark.parametrize("size", [10**4, 10**7])
def test_a_bomb_expands(size):
    packed = grammar.zlib_bomb(size)
    assert zlib.decompress(packed) == bytes(size) and len(packed) < size / 90


def reads_outside(path):
    (path.parent.parent / "outside.png").read_bytes()


def runs_code(path):
    subprocess.run(["true"])


def allocates(path):
    bytearray(700 << 20)[-1:]


def names_nothing(path):
    raise ValueError("damaged")


PLANTED = {
    "reads outside": (reads_outside, "open .*outside.png"),
    "runs code": (runs_code, "subprocess.Popen"),
    "leaves a mark": (lambda path: (path.parent / "hostile-mark").touch(), "code ran"),
    "allocates": (allocates, "MB"),
    "names nothing": (names_nothing, "does not name the file"),
    "another error": (lambda path: {}["x"], "KeyError"),
    "crashes": (lambda path: os.kill(os.getpid(), signal.SIGSEGV), "ended with -11"),
    "is slow": (lambda path: time.sleep(1.1), "1.1 s"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_sandbox_notices(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    read, words = PLANTED[name]
    reader = dataclasses.replace(READERS[0], read=read)
    (case, outcome), *rest = run(reader, range(1), tmp_path / "data")
    assert (case, rest) == (0, []) and outcome["kind"] == "wrong"
    assert re.search(words, outcome["said"]), outcome


def coco_with(tmp_path, **changes):
    """A data set whose further annotation has the given changes; evaluated without detections."""
    tmp_path = tmp_path / "data"
    tmp_path.mkdir()
    content = json.loads(coco(tmp_path))
    content["annotations"].append(content["annotations"][3] | {"id": 77} | changes)
    (tmp_path / "file.json").write_text(json.dumps(content), encoding=changes.pop("encoding", "utf-8"))
    return CocoDataset(tmp_path / "file.json", tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": [1]},
        {"image_id": {}},
        {"image_id": True},
        {"category_id": [2]},
        {"bbox": [10**400, 0, 1, 1]},
        {"iscrowd": 2},
    ],
    ids=str,
)
def test_ground_truth_skips_what_data_sets_skip(tmp_path, changes):
    data = coco_with(tmp_path, **changes)
    assert sum(data.skipped.values()) == 1
    assert evaluator_of(data).compute()["bbox"]["instances"] == 3


@pytest.mark.parametrize("area", [10**400, float("nan"), True, "9"], ids=str)
def test_areas_that_are_no_numbers(tmp_path, area):
    assert evaluator_of(coco_with(tmp_path, area=area, iscrowd=0)).compute()["bbox"]["instances"] == 4


def test_crowd_regions_of_any_size_as_masks(tmp_path):
    """Their box stands for the mask: pycocotools would allocate memory for its length."""
    evaluator = evaluator_of(coco_with(tmp_path, bbox=[-1e308, -1e308, 1.7e308, 1.7e308]))
    evaluator._masks = True
    assert evaluator.compute()["segm"]["instances"] == 3


@pytest.mark.parametrize("counts", ["ooo1ooo1ooo1", "zzzz", "\x00\x01"], ids=repr)
def test_run_lengths_are_checked_before_pycocotools(tmp_path, counts):
    data = coco_with(tmp_path, segmentation={"size": [6, 12], "counts": counts}, iscrowd=0)
    evaluator = evaluator_of(data)
    evaluator._masks = True
    assert evaluator.compute()["segm"]["instances"] == 3


def test_a_byte_order_mark_is_evaluated(tmp_path):
    assert evaluator_of(coco_with(tmp_path, encoding="utf-8-sig")).compute()["bbox"]["instances"] == 3


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"seed": ' + "9" * 10_000 + "}", "", "\0"], ids=["deep", "digits", "", "0"]
)
def test_recipes_that_are_no_json(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.json"):
        find_recipe(str(path))


def test_numbers_of_any_size_in_recipes_and_results(tmp_path):
    path = tmp_path / "recipe.json"
    recipe = get_recipe("scenes-retinanet-lgd").to_dict()
    recipe["optimizer"]["learning_rate"] = 10**400
    path.write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="learning_rate must be a number below 2e308"):
        find_recipe(str(path))
    assert number(10**400) is None and number(float("nan")) is None and number(10**300) == 1e300


def test_control_characters_never_reach_the_terminal(capsys, monkeypatch):
    evil = "a\x1b[2J\u202eb\x9b\x00c\nd\te"
    assert (
        printable(evil) == "a\ufffd[2J\ufffdb\ufffd\ufffdc\nd\te"
        and printable("caf\u00e9 [bold]") == "caf\u00e9 [bold]"
    )
    metrics = {"AP": 1.0, "AP50": 1.0, "AP75": 1.0, "APs": 1.0, "APm": 1.0, "APl": 1.0, "instances": 3}
    table = class_table({"bbox": {"per_class": {evil: metrics}}})
    assert "\x1b" not in str(table.columns[0]._cells[0]) and "\u202e" not in str(table.columns[0]._cells[0])

    def fails(args):
        raise ValueError(evil)

    monkeypatch.setattr(cli, "run", fails)
    cli.main(["evaluate"])
    assert capsys.readouterr().err == "fastkd: error: a\ufffd[2J\ufffdb\ufffd\ufffdc d e\n"
    with pytest.raises(ValueError, match="name must be printable text"):
        dataclasses.replace(get_recipe("scenes-retinanet-lgd"), name="\x1b[2J")
