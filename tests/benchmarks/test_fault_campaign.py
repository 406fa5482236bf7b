"""A few cases of the fault campaign, and that it notices a run that is not what it should be."""

import itertools
import json
import time

import pytest

from benchmarks.faults import kills, tiny
from benchmarks.faults.table import page


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("faults") / "data")


def test_killed_and_resumed(data, tmp_path):
    figures = {}
    for trial in itertools.islice(kills.one_process(tmp_path, tiny.recipe(data), 0), 12):
        assert not trial["problem"]
        kills.add(figures, trial)
        if figures["kills"] >= 2:  # a run may end before it is killed
            break
    assert figures["kills"] == sum(figures["phases"].values()) >= 2 and figures["next_seed"] == figures["runs"]
    assert "problems" not in figures and [path.name for path in tmp_path.glob("killed-*")] == []
    text = page({"kills": figures | {"seconds": 1.0, "commit": "x"}})
    assert f"**{figures['kills']} kills** in {figures['runs']} runs" in text


def test_a_difference_is_noticed(data, tmp_path):
    assert tiny.call(lambda: tiny.run(tiny.recipe(data), tmp_path / "run")).code == 0
    whole = tiny.result(tmp_path / "run")
    (tmp_path / "run/.tmpabcdef").write_text("left over")
    assert tiny.difference(whole, tiny.result(tmp_path / "run")).startswith("files")
    log = tmp_path / "run/log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"loss": 0.0}), *lines[1:]]) + "\n")
    assert tiny.difference(whole, tiny.result(tmp_path / "run")).startswith("log")


def test_ends_of_forked_processes():
    def fails():
        raise KeyError("x")

    assert tiny.call(lambda: 3).code == 3
    ended = tiny.call(fails)
    assert ended.code == 70 and ended.last == "KeyError: 'x'"
    assert tiny.call(lambda: time.sleep(60), patience=0.2).code == -9
