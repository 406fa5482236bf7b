"""Two processes under torchrun: the gradients of one, phases without unused parameters, agreement, resuming."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import assert_same_run, everything, make_tiny_data
from two_processes import CASES, gradient_recipe, gradients

from fastkd.training.parallel.processes import Processes

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


@pytest.fixture(scope="module")
def outputs(tiny_data, tmp_path_factory):
    """The folder that the two processes have filled."""
    for kind, method in CASES:  # makes the teachers' files, which the processes share
        gradient_recipe(tiny_data, kind, method)
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(TESTS / "two_processes.py"), str(tiny_data), str(out)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def report(outputs, rank):
    return json.loads((outputs / f"report-{rank}.json").read_text())


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_gradients_of_two_processes_are_those_of_one(tiny_data, outputs, kind, method):
    found = [load_file(outputs / f"{kind}-{method}-{rank}.safetensors") for rank in range(2)]
    expected = gradients(gradient_recipe(tiny_data, kind, method), Processes(0, 1, torch.device("cpu")))
    assert expected.keys() == found[0].keys()
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert torch.equal(found[0][name], found[1][name]), name
        largest = value.abs().max()
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-4 * largest + 1e-6 * scale, msg=name)


def test_a_run_through_all_phases_stopped_and_resumed(outputs):
    for rank in range(2):
        told = report(outputs, rank)
        assert told["whole"] == told["resumed"] == "finished" and told["again"] == "already finished"
        assert told["stopped"] == 143  # both, though only rank 1 got the signal
        assert told["metrics"] == report(outputs, 0)["metrics"]
        assert told["balance"] == report(outputs, 0)["balance"] and told["balance"][-1][""]["method"] > 0
    assert_same_run(everything(outputs / "whole"), everything(outputs / "halves"))
    assert json.loads((outputs / "whole/metrics.json").read_text())["processes"] == 2


def test_errors_reach_every_process(outputs):
    ids = report(outputs, 1)["ids"]
    for rank in range(2):
        told = report(outputs, rank)
        assert told["refused"].startswith("RunDirectoryError: train: run directory must be new or empty")
        assert told["uneven"].startswith("ValueError: train: schedule.batch_size / accumulate must be a multiple of")
        message = told["non-finite"]
        assert message.startswith("NonFiniteLossError") and "step 1 " in message
        assert "box_regression" in message and f"image ids {ids}" in message
    assert not list((outputs / "non-finite").glob("checkpoints/step_*"))
