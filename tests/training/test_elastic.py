"""torchrun --max-restarts: a killed worker leads to a restart from the last checkpoint and to the same weights."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_runs import assert_same_run, everything, make_tiny_data, silent, tiny_detector, tiny_recipe

from fastkd.training import train
from fastkd.training.config import RuntimeConfig, Schedule

TESTS = Path(__file__).parents[1]


def test_a_killed_worker(tmp_path, tmp_path_factory):
    data = make_tiny_data(tmp_path_factory)
    runtime = RuntimeConfig(precision="float32", log_every=1, checkpoint_every=2, ledger_pairs=0)
    detector = tiny_detector("retinanet", norm="frozen_bn", head_norm="gn")  # no batch statistics of each process
    schedule = Schedule(steps=6, batch_size=4)
    recipe = tiny_recipe(data, "retinanet", "lgd", detector=detector, runtime=runtime, schedule=schedule)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=1))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [str(TESTS / "killed_worker.py"), str(tmp_path)]
    asked = ["train", str(tmp_path / "recipe.json"), "--device", "cpu", "--run-dir", str(tmp_path / "killed")]
    done = subprocess.run(
        [*launch, "--max-restarts", "1", *program, *asked, "--resume"],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    attempts = sorted(path.name for path in tmp_path.glob("attempt-*"))
    assert attempts == ["attempt-0-0", "attempt-0-1", "attempt-1-0", "attempt-1-1"]
    assert "exitcode: -9" in done.stderr and "resuming after step 2" in done.stderr
    assert_same_run(everything(tmp_path / "whole"), everything(tmp_path / "killed"))

    # other processes may take over: one goes on from what two have saved
    alone = shutil.copytree(tmp_path / "whole", tmp_path / "alone")
    (alone / "metrics.json").unlink()
    shutil.rmtree(alone / "checkpoints/step_0000006")
    assert train(recipe, alone, device="cpu", console=silent(), resume=True).status == "finished"
    one, two = (load_file(run / "student.safetensors") for run in (alone, tmp_path / "whole"))
    assert json.loads((alone / "metrics.json").read_text())["processes"] == 1
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=1e-3, atol=1e-4, msg=name)
