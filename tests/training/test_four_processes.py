"""Four processes, two under each of two torchruns: gradients, bytes sent, weights and evaluation of one process."""

import functools
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from four_processes import CASES, STEPS, evaluate, gradients, recipe_of
from safetensors.torch import load_file
from tiny_runs import make_tiny_data, silent

from fastkd.training import train
from fastkd.training.build import build
from fastkd.training.parallel import processes as distributed
from fastkd.training.parallel.processes import Processes, check_shares, own_device, processes

TESTS = Path(__file__).parents[1]
ONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


@pytest.fixture(scope="module")
def outputs(tiny_data, tmp_path_factory):
    """The folder that the four processes have filled."""
    recipe_of(tiny_data, 1)  # makes the teacher's file
    out = tmp_path_factory.mktemp("four")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    machine = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    command = [sys.executable, "-m", "torch.distributed.run", *machine, "--rdzv-id", "7", "--local-addr", "127.0.0.1"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    machines = [
        subprocess.Popen(
            [*command, str(TESTS / "four_processes.py"), str(tiny_data), str(out)],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for each in machines:
            error = each.communicate(timeout=500)[1]  # 180 s on a busy machine
            assert each.returncode == 0, error[-4000:]
    finally:
        for each in machines:
            each.terminate()
    return out


@pytest.fixture(scope="module")
def expected_gradients(tiny_data):
    """The gradients of one process, by accumulated parts."""
    return functools.cache(lambda accumulate: gradients(recipe_of(tiny_data, accumulate), ONE, "none")[0])


def reports(outputs):
    return [json.loads((outputs / f"report-{rank}.json").read_text()) for rank in range(4)]


def test_ranks_of_two_machines(outputs):
    assert sorted(told["ranks"] for told in reports(outputs)) == [[0, 0, 4], [1, 1, 4], [2, 0, 4], [3, 1, 4]]


@pytest.mark.parametrize(("accumulate", "compression", "tolerance"), CASES)
def test_gradients_and_the_bytes_sent_for_them(
    tiny_data, outputs, expected_gradients, accumulate, compression, tolerance
):
    found = load_file(outputs / f"{accumulate}-{compression}.safetensors")
    recipe = recipe_of(tiny_data, accumulate)
    expected = expected_gradients(accumulate)
    assert expected.keys() == found.keys()
    for step in range(STEPS):
        ours, one = ({n: g for n, g in every.items() if n.startswith(f"{step}:")} for every in (found, expected))
        scale = max(value.abs().max() for value in one.values())
        for name, value in one.items():
            allowed = tolerance * value.abs().max() + max(1e-6, 0.01 * tolerance) * scale
            torch.testing.assert_close(ours[name], value, rtol=0, atol=allowed, msg=name)
    kind = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[compression]
    numbers = sum(p.numel() for p in build(recipe).module.parameters() if p.requires_grad)
    for told in (report[f"{accumulate}-{compression}"] for report in reports(outputs)):
        assert {name for name, _ in told["sent"]} == {str(kind)}
        # each gradient goes once a step, however many parts the step has
        assert sum(size for _, size in told["sent"]) == STEPS * numbers * kind.itemsize
        assert told["static"] == (accumulate == 1) and told["find_unused"] is False


def test_weights_equal_one_process(tiny_data, outputs, tmp_path):
    recipe = recipe_of(tiny_data, 2)
    one = train(recipe, tmp_path / "one", device="cpu", console=silent())
    ours, theirs = (load_file(run / "student.safetensors") for run in (outputs / "run", one.run_dir))
    start = build(recipe).module.detector.state_dict()
    moved = max((value - start[name]).abs().max() for name, value in theirs.items())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=float(moved) * 1e-3, msg=name)
    lines = [[json.loads(x) for x in (run / "log.jsonl").open()] for run in (outputs / "run", one.run_dir)]
    losses = [[x["loss"] for x in every if "loss" in x] for every in lines]  # the others are of evaluations
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_evaluation(tiny_data, outputs):
    metrics, detections = json.loads(json.dumps(evaluate(recipe_of(tiny_data, 1), ONE)))
    assert metrics["bbox"]["AP"] > 0.1
    for told in reports(outputs):
        assert told["metrics"] == metrics
        scores = [sorted((d["image_id"], d["score"]) for d in found) for found in (told["detections"], detections)]
        assert [image for image, _ in scores[0]] == [image for image, _ in scores[1]]
        assert [score for _, score in scores[0]] == pytest.approx([score for _, score in scores[1]], rel=1e-4)


def test_a_run_with_compression(outputs):
    assert {told["bf16"] for told in reports(outputs)} == {"finished"}
    finished = json.loads((outputs / "bf16/metrics.json").read_text())
    assert finished["processes"] == 4 and finished["loading"]["loader_images_per_second"] > 0
    one, other = (load_file(outputs / run / "student.safetensors") for run in ("run", "bf16"))
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_errors(outputs, monkeypatch):
    assert all("must be a multiple of the 4 processes, got 6" in told["uneven"] for told in reports(outputs))
    check_shares(6, "bf16", 2)
    with pytest.raises(ValueError, match=r"grad_compression must be none for one process.*got fp16"):
        check_shares(6, "fp16", 1)
    with pytest.raises(ValueError, match=r"got cuda without a GPU"):
        own_device("cuda", 0, False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(None, 1, True) == own_device("cuda:1", 0, False) == torch.device("cuda", 1)
    assert own_device("cpu", 5, True) == torch.device("cpu")
    with pytest.raises(ValueError, match="LOCAL_RANK 2 with 2 GPUs"):
        own_device("cuda", 2, True)
    with pytest.raises(ValueError, match="each of which takes its own, got cuda:1"), processes("cuda:1"):
        pass


def test_processes_that_do_not_come(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        alone = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    for name, value in alone.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(torch.distributed.DistStoreError, match=r"(?i)timed out"), processes("cpu", timeout=0.01):
        pass
    # torchrun's store after a restart: what a killed process left is no answer
    store = torch.distributed.HashStore()
    store.set("fastkd/token/1", "of the killed one")
    with pytest.raises(TimeoutError, match=r"2 processes must start .* got none of rank \[1\]"):
        distributed._rendezvous_key(store, 0, 2, timeout=0.002)
    with ThreadPoolExecutor() as threads:
        zero = threads.submit(distributed._rendezvous_key, store, 0, 3, 1.0)
        others = [threads.submit(distributed._rendezvous_key, store, rank, 3, 1.0) for rank in (2, 1)]
        assert {zero.result(20)} == {other.result(20) for other in others}
