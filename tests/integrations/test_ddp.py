"""Two gloo processes, each with half the batch, have the gradients of one process with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_gloo_processes import HOSTS, METHODS

HERE = Path(__file__).parent
CASES = [("torchvision", method) for method in METHODS]
CASES += [(host, method) for host in ("transformers", "lightning") for method in ("icd", "lgd")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, HERE / "two_gloo_processes.py", str(r), folder / "store", folder] for r in (0, 1)]
    running = [subprocess.Popen(command, env=environment, cwd=folder) for command in commands]
    assert [process.wait(300) for process in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(("host", "method"), CASES)
def test_gradients_equal_one_process(found, host, method, tmp_path, monkeypatch):
    if host != "torchvision":
        pytest.importorskip(host, reason=f"{host} is not installed (pip install .[hosts])")
    monkeypatch.chdir(tmp_path)
    whole, (first, second) = HOSTS[host](method, slice(None)), (ranks[host, method] for ranks in found)
    assert set(whole) == set(first)
    for name, value in whole.items():
        torch.testing.assert_close(first[name], value, rtol=2e-3, atol=1e-5 * (1 + float(value.abs().max())))
        assert torch.equal(first[name], second[name]), name
