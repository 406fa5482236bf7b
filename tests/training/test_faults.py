"""Faults that the campaign (benchmarks/faults) found, and a few cases of each of its parts."""

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_same_run, everything, make_tiny_data, silent, tiny_recipe

from fastkd import cli
from fastkd.data import CocoDataset, LoaderError, explaining_dead_workers
from fastkd.files import naming, remove_leftovers, replacing
from fastkd.tensor_files import save_tensor_file
from fastkd.training import train
from fastkd.training import trainer as module
from fastkd.training.run.checkpoint import Checkpoint, save_checkpoint
from fastkd.training.run.directory import RunDirectoryError, inspect_run_directory
from fastkd.training.run.logging import RunLog

LEFTOVERS = (".recipe.json.123.part", ".student.safetensors.7.part", ".tmpn5CHlu")


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


def run(recipe, run_dir, **options):
    return train(recipe, run_dir, device="cpu", console=silent(), **options)


def test_a_run_killed_before_its_recipe_was_written_starts_again(tiny_data, tmp_path):
    for name in LEFTOVERS:
        (tmp_path / name).write_text("{")
    recipe = tiny_recipe(tiny_data)
    for resume in (True, False):
        assert inspect_run_directory(tmp_path, recipe, resume=resume) is None
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"must hold recipe\.json"):
        inspect_run_directory(tmp_path, recipe, resume=True)


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    kept = [".gitignore", ".part", "x.part", "tmpabcdef", ".tmpabc"]
    for name in (*LEFTOVERS, *kept):
        (tmp_path / name).write_text("")
    (tmp_path / ".folder.1.part").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".folder.1.part"])


def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'"), replacing(tmp_path / "a.json"):
        full()
    with pytest.raises(PermissionError, match=r"'.*/b\.json'"), naming(tmp_path / "b.json"):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(FileNotFoundError, match="'elsewhere'"), replacing(tmp_path / "c.json"):
        raise FileNotFoundError(errno.ENOENT, "no", "elsewhere")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.safetensors"):
        save_tensor_file(tmp_path / "nowhere/a.safetensors", {"a": torch.zeros(2)}, {"b": "c"})


def test_a_failed_checkpoint_leaves_its_space_free(tmp_path, monkeypatch):
    state = Checkpoint(1, {"a": torch.zeros(2)}, {}, {})
    monkeypatch.setattr("fastkd.training.run.checkpoint.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, state, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_while_it_pruned_leaves_nothing(tiny_data, tmp_path):
    recipe = tiny_recipe(tiny_data)
    run(recipe, tmp_path)
    folder = tmp_path / "checkpoints"
    before = sorted(path.name for path in folder.iterdir())
    (tmp_path / "metrics.json").unlink()
    (folder / "step_0000001").mkdir()  # a part of it is deleted
    (folder / ".part_step_0000007").mkdir()
    run(recipe, tmp_path, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_full_disk_says_how_to_go_on(capsys, monkeypatch):
    def fails(args):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/log.jsonl")

    monkeypatch.setattr(cli, "run", fails)
    assert cli.main(["train", "r"]) == 2
    assert capsys.readouterr().err == (
        "fastkd: error: runs/a/log.jsonl: No space left on device; free some space; continue with: fastkd train r "
        "--resume\n"
    )


def test_a_log_with_damaged_bytes_is_read(tmp_path):
    line = '{"step": 1, "loss": 1.0}\n'
    (tmp_path / "log.jsonl").write_bytes(line.encode() + b'{"step": 2, \xff\xfe}\n' + b"[" * 100_000 + b"\n\0\0\0\n")
    RunLog(tmp_path, 5).close()
    assert (tmp_path / "log.jsonl").read_text() == line


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000], ids=["empty", "cut", "deep"])
def test_damaged_metrics_are_named(tiny_data, tmp_path, content):
    recipe = tiny_recipe(tiny_data)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=r"metrics\.json must be JSON"):
        inspect_run_directory(tmp_path, recipe, resume=True)


def at_step(monkeypatch, step, action):
    original = module.Trainer._take_step

    def take_step(self, parts):
        if self.step == step:
            action()
        return original(self, parts)

    monkeypatch.setattr(module.Trainer, "_take_step", take_step)


def test_a_dead_loader_process_is_named_and_resumed(tiny_data, tmp_path, monkeypatch):
    recipe = tiny_recipe(tiny_data)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=1))
    run(recipe, tmp_path / "whole")

    def kill():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.1)

    with monkeypatch.context() as patch, pytest.raises(LoaderError, match="a loader process died"):
        at_step(patch, 1, kill)
        run(recipe, tmp_path / "killed")
    run(recipe, tmp_path / "killed", resume=True)
    assert_same_run(everything(tmp_path / "whole"), everything(tmp_path / "killed"))


def test_other_errors_are_not_taken_for_dead_workers():
    with pytest.raises(RuntimeError, match=r"^shape$"), explaining_dead_workers():
        raise RuntimeError("shape")


def test_validation_annotations_that_change_while_training(tiny_data, tmp_path, monkeypatch):
    root = shutil.copytree(tiny_data, tmp_path / "data")
    recipe = tiny_recipe(tiny_data)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=str(root)))
    run(recipe, tmp_path / "whole")
    file = root / "annotations/val.json"
    content = file.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"val\.json with another content; restore"):
        at_step(patch, 3, lambda: file.write_bytes(content.replace(b'"bbox":[', b'"bbox":[1')))
        run(recipe, tmp_path / "changed")
    file.write_bytes(content)
    run(recipe, tmp_path / "changed", resume=True)
    assert_same_run(everything(tmp_path / "whole"), everything(tmp_path / "changed"))


def test_an_image_that_changes_is_logged_once(tiny_data, tmp_path, caplog):
    root = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    data = CocoDataset(root / "annotations/train.json", root / "train")
    data.read_image(0)
    assert "changed after" not in caplog.text
    data._opened -= 3600  # as if it had been opened an hour ago: file times are too coarse for a quick test
    for _ in range(2):
        data.read_image(0)
    assert caplog.text.count("changed after the data set was opened") == 1 and data.file_name(0) in caplog.text


def test_a_run_directory_with_brackets_in_its_name(tiny_data, tmp_path):
    """rich would take them for markup and raise at the end of the run."""
    console = silent()
    train(tiny_recipe(tiny_data), tmp_path / "[/x]", device="cpu", console=console)
    assert "[/x]" in console.file.getvalue()
