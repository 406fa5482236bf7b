"""Two gloo processes, each with half the batch, have the gradients of one process with all of it, and fail together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_gloo_processes import HOSTS, METHODS, environment_of_rank, gradients_of_rank

HERE = Path(__file__).parent
CASES = [("torchvision", method) for method in METHODS]
CASES += [(host, method) for host in ("transformers", "lightning") for method in ("icd", "lgd")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Gradients of both processes; this one is the first, as it has imported the hosts already."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "two_gloo_processes.py", "1", folder / "store", folder]
    second, threads = subprocess.Popen(command, env=environment, cwd=folder), torch.get_num_threads()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for name, value in environment_of_rank(0).items():
                patch.setenv(name, value)
            torch.set_num_threads(1)
            first = gradients_of_rank(0, folder / "store")
        assert second.wait(100) == 0
    finally:
        second.kill()
        torch.set_num_threads(threads)
    return [first, torch.load(folder / "1.pt", weights_only=True)]


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


@pytest.mark.parametrize("method", ["icd", "scorel2", "lgd"])
def test_a_failure_in_one_process_is_one_in_both(found, method):
    """Its batch trains the host alone in both processes; gradients and the method's weights stay equal."""
    first, second = (ranks["failing", method] for ranks in found)
    assert [bool(names) for names, _, _ in first] == [True, False, False, True, False, True]
    assert [failures for _, failures, _ in first] == [0, 1, 2, 0, 1, 0]
    for (names, failures, state), (other_names, other_failures, others) in zip(first, second, strict=True):
        assert names == other_names and failures == other_failures
        for name, value in state.items():
            assert torch.equal(value, others[name]), name


def test_a_first_batch_or_update_that_fails_in_one_process_ends_both(found):
    first, second = (ranks["failing", "first"] for ranks in found)
    assert first[0] == second[1] == "broken" and "failed in another process" in first[1]
    assert first[1] == second[0]
