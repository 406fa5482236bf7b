"""Two gloo processes, each with half the batch, have the gradients of one process with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_gloo_processes import gradients

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, HERE / "two_gloo_processes.py", str(r), folder / "store", folder] for r in (0, 1)]
    running = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait(300) for process in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("method", ["icd", "lgd", "fgfi"])
def test_gradients_equal_one_process(found, method):
    whole = gradients(method, slice(None))
    assert set(whole) == set(found[0][method])
    for name, grad in whole.items():
        torch.testing.assert_close(found[0][method][name], grad, rtol=2e-3, atol=1e-5 * (1 + float(grad.abs().max())))
        assert torch.equal(found[0][method][name], found[1][method][name]), name
