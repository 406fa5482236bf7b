"""Interrupted anywhere and resumed equals uninterrupted, to the last bit; signals save and leave."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from draws import draws, few, seed
from tiny_runs import assert_same_run, everything, make_tiny_data, silent, tiny_recipe

from fastkd.signals import Interrupted, StopSignals
from fastkd.training import train
from fastkd.training import trainer as module
from fastkd.training.config import OptimizerConfig, Recipe, RuntimeConfig, Schedule
from fastkd.training.methods import LGDConfig
from fastkd.training.run.directory import RunDirectoryError

RUNTIME = RuntimeConfig(precision="float32", log_every=2, checkpoint_every=3, ledger_pairs=1, eval_every=3)
ADAMW = OptimizerConfig(kind="adamw", learning_rate=1e-3, decay="cosine", clip_norm=1.0)


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


def run(recipe, run_dir, **options):
    return train(recipe, run_dir, device="cpu", console=silent(), **options)


def stop_after(monkeypatch, step, signum=signal.SIGTERM):
    """Sends this process a signal in the middle of step `step`."""
    original = module.Trainer._take_step

    def take_step(self, parts):
        if self.step + 1 == step:
            os.kill(os.getpid(), signum)
        return original(self, parts)

    monkeypatch.setattr(module.Trainer, "_take_step", take_step)


def crash_after(monkeypatch, step):
    """Ends the run without a word after step `step`."""
    original = module.Trainer._take_step

    def take_step(self, parts):
        if self.step == step:
            raise RuntimeError("power cut")
        return original(self, parts)

    monkeypatch.setattr(module.Trainer, "_take_step", take_step)


CASES = {
    "baseline": ("retinanet", "baseline", {}),
    "adamw, bfloat16, workers": ("retinanet", "baseline", {"optimizer": ADAMW, "precision": "bfloat16", "workers": 1}),
    "lgd, frozen backbone, accumulated": (
        "retinanet",
        "lgd",
        {"freeze": True, "schedule": Schedule(steps=6, batch_size=4, accumulate=2), "workers": 1},
    ),
    "icd": ("retinanet", "icd", {"workers": 1}),
    "fgfi": ("fcos", "fgfi", {}),
    "two-stage icd": ("faster-rcnn", "icd", {}),
    "masks, lgd": ("mask-rcnn", "lgd", {}),
}


def make(data, tmp_path, kind, method, options):
    recipe = tiny_recipe(data, kind, method)
    runtime = dataclasses.replace(RUNTIME, precision=options.get("precision", "float32"))
    workers = dataclasses.replace(recipe.data, workers=options.get("workers", 0))
    optimizer = options.get("optimizer", recipe.optimizer)
    schedule = options.get("schedule", Schedule(steps=6, batch_size=2))
    recipe = dataclasses.replace(recipe, runtime=runtime, data=workers, optimizer=optimizer, schedule=schedule)
    if options.get("freeze"):
        weights = backbone_file(recipe, tmp_path)
        phases = LGDConfig(freeze_fraction=0.5, detach_fraction=0.7, final_fraction=0.17)
        recipe = dataclasses.replace(recipe, method=phases, backbone_weights=str(weights))
    return recipe


def backbone_file(recipe, tmp_path) -> Path:
    from safetensors.torch import save_file

    from fastkd.detectors import build_detector

    save_file(build_detector(recipe.detector).backbone.state_dict(), tmp_path / "backbone.safetensors")
    return tmp_path / "backbone.safetensors"


# The next test stops the baseline, and test_stopped_again_and_again ICD.
ALWAYS = ("adamw, bfloat16, workers", "lgd, frozen backbone, accumulated")
SHORT = (*ALWAYS, *few([name for name in CASES if name not in ALWAYS]))


@pytest.mark.parametrize(
    "case", [pytest.param(CASES[name], id=name, marks=[pytest.mark.long] * (name not in SHORT)) for name in CASES]
)
def test_stopped_and_resumed_is_bit_exact(tiny_data, tmp_path, monkeypatch, case):
    recipe = make(tiny_data, tmp_path, *case)
    run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        result = run(recipe, tmp_path / "halves")
    assert (result.status, result.exit_code, result.metrics) == ("interrupted", 143, {})
    assert sorted(p.name for p in (tmp_path / "halves/checkpoints").iterdir())[-1] == "step_0000004"
    assert not (tmp_path / "halves/metrics.json").exists()
    assert run(recipe, tmp_path / "halves", resume=True).status == "finished"
    assert_same_run(everything(tmp_path / "whole"), everything(tmp_path / "halves"))


def test_every_step_can_be_the_last_before_a_stop_or_a_crash(tiny_data, tmp_path, monkeypatch):
    """Two stops and a crash drawn anew in each run; all of them under --long."""
    recipe = make(tiny_data, tmp_path, "retinanet", "baseline", {})
    run(recipe, tmp_path / "whole")
    expected = everything(tmp_path / "whole")
    choose = random.Random(seed())
    for step in choose.sample(range(1, 7), max(2, draws(6))):
        with monkeypatch.context() as patch:
            stop_after(patch, step, signal.SIGINT)
            assert run(recipe, tmp_path / f"stop{step}").exit_code == 130
        run(recipe, tmp_path / f"stop{step}", resume=True)
        assert_same_run(expected, everything(tmp_path / f"stop{step}"))
    for step in choose.sample((0, 2, 5), draws(3)):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
            crash_after(patch, step)
            run(recipe, tmp_path / f"crash{step}")
        run(recipe, tmp_path / f"crash{step}", resume=True)
        assert_same_run(expected, everything(tmp_path / f"crash{step}"))


def test_stopped_again_and_again(tiny_data, tmp_path, monkeypatch):
    recipe = make(tiny_data, tmp_path, "retinanet", "icd", {})
    run(recipe, tmp_path / "whole")
    for step in (1, 2, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            assert run(recipe, tmp_path / "pieces", resume=True).status == "interrupted"
    run(recipe, tmp_path / "pieces", resume=True)
    assert_same_run(everything(tmp_path / "whole"), everything(tmp_path / "pieces"))


def test_a_damaged_checkpoint_costs_steps_not_exactness(tiny_data, tmp_path, monkeypatch):
    recipe = make(tiny_data, tmp_path, "retinanet", "baseline", {})
    run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        run(recipe, tmp_path / "halves")
    os.truncate(tmp_path / "halves/checkpoints/step_0000005/model.safetensors", 1000)
    with pytest.warns(UserWarning, match="step_0000005.*going back to step_0000003"):
        run(recipe, tmp_path / "halves", resume=True)
    assert_same_run(everything(tmp_path / "whole"), everything(tmp_path / "halves"))


def test_a_changed_teacher_or_data_set_is_refused(tiny_data, tmp_path, monkeypatch):
    root = shutil.copytree(tiny_data, tmp_path / "data")
    recipe = make(root, tmp_path, "retinanet", "fgfi", {})
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run(recipe, tmp_path / "run")
    teacher = Path(recipe.teacher)
    content = teacher.read_bytes()
    from fastkd.detectors import build_detector, load_detector, save_detector

    detector, names = load_detector(teacher)
    save_detector(build_detector(detector.config), teacher, names)
    with pytest.raises(RunDirectoryError, match="teacher must be the file the run began with"):
        run(recipe, tmp_path / "run", resume=True)
    teacher.write_bytes(content)
    annotations = root / "annotations/train.json"
    original = annotations.read_text()
    moved = json.loads(original)
    moved["annotations"][0]["bbox"][2] -= 1
    annotations.write_text(json.dumps(moved))
    with pytest.raises(RunDirectoryError, match="data must be what the run began with"):
        run(recipe, tmp_path / "run", resume=True)
    annotations.write_text(original)
    fewer = json.loads(annotations.read_text())
    gone = fewer["images"].pop()["id"]
    fewer["annotations"] = [a for a in fewer["annotations"] if a["image_id"] != gone]
    annotations.write_text(json.dumps(fewer))
    with pytest.raises(RunDirectoryError, match=r"data must be what the run began with.*'images': 20.*'images': 19"):
        run(recipe, tmp_path / "run", resume=True)


def test_stopped_in_the_last_evaluation(tiny_data, tmp_path, monkeypatch):
    recipe = make(tiny_data, tmp_path, "retinanet", "baseline", {})
    run(recipe, tmp_path / "whole")
    original = module.Evaluation.run
    for place in ("halves", "middle"):
        with monkeypatch.context() as patch:

            def stopped(self, detector, *, progress, place=place, calls=[]):  # noqa: B006
                calls.append(1)
                if place == "middle" or len(calls) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.01)
                return original(self, detector, progress=progress)

            patch.setattr(module.Evaluation, "run", stopped)
            assert run(recipe, tmp_path / place).exit_code == 143
        run(recipe, tmp_path / place, resume=True)
        assert_same_run(everything(tmp_path / "whole"), everything(tmp_path / place))


def test_signals():
    previous = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(Interrupted), stop.interrupt_at_once():
            raise AssertionError("not reached: the signal came before")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is previous


PROGRAM = """
import json, sys
from fastkd.training import Recipe, train
recipe = Recipe.from_dict(json.loads(open(sys.argv[1]).read()))
sys.exit(train(recipe, sys.argv[2], resume=True, device="cpu").exit_code)
"""


def test_a_real_process_and_its_whole_group(tiny_data, tmp_path):
    recipe = make(tiny_data, tmp_path, "retinanet", "baseline", {"workers": 1})
    runtime = RuntimeConfig(precision="float32", log_every=1, checkpoint_every=1000, ledger_pairs=0)
    recipe = dataclasses.replace(recipe, schedule=Schedule(steps=4000, batch_size=2), runtime=runtime)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    assert Recipe.from_dict(json.loads((tmp_path / "recipe.json").read_text())) == recipe
    log, done = tmp_path / "run/log.jsonl", 0
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "recipe.json"), str(tmp_path / "run")]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < done + 3):
                time.sleep(0.02)
            os.killpg(process.pid, signum)  # as a terminal and torchrun do: loader processes get it too
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == code, errors
        assert "Traceback" not in errors and "Error" not in errors
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= done + 3
        done = len(steps)
        assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())[-1] == f"step_{done:07d}"


def test_unreadable_images_are_counted(tiny_data, tmp_path, monkeypatch):
    root = shutil.copytree(tiny_data, tmp_path / "data")
    for part in ("train", "val"):
        image = sorted((root / part).iterdir())[0]
        image.write_bytes(image.read_bytes()[:-200])  # its header still says how large it is
    recipe = tiny_recipe(root, schedule=Schedule(steps=12, batch_size=4))
    console = silent()
    metrics = train(recipe, tmp_path / "whole", device="cpu", console=console).metrics
    assert len(metrics["train_unreadable"]) == 1 and metrics["train_unreadable"].popitem()[1] >= 2
    assert metrics["bbox"]["unread"] == 1 and metrics["bbox"]["images"] == 6
    text = console.file.getvalue()
    assert "1 training images could not be read, others took their place" in text
    assert "1 of 6 images could not be read; their objects count as missed" in text
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        train(recipe, tmp_path / "halves", device="cpu", console=silent())
    halves = train(recipe, tmp_path / "halves", device="cpu", console=silent(), resume=True).metrics
    assert halves["train_unreadable"] == json.loads((tmp_path / "whole/metrics.json").read_text())["train_unreadable"]
