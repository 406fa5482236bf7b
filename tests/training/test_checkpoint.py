"""Checkpoints: whole or not there, verified, never unpickled, the last few kept."""

import json
import os
import shutil

import pytest
import torch

from fastkd import files
from fastkd.files import write_json
from fastkd.training.run import checkpoint as module
from fastkd.training.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def make(step: int) -> Checkpoint:
    shared = torch.arange(6.0)
    model = {
        "a": torch.randn(3, 4).t(),
        "half": torch.randn(2, 3).bfloat16(),
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "count": torch.tensor(step),
        "empty": torch.zeros(0, 4),
        "view": shared[:3],
        "other view": shared[2:],
    }
    state = {"seconds": 0.1 + step, "ledger": None}
    return Checkpoint(step, model, {"student/a/momentum_buffer": torch.randn(4, 3)}, state)


def test_round_trip(tmp_path):
    saved = make(7)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved, 2))
    assert loaded.step == 7 and loaded.state == saved.state
    for one, other in ((saved.model, loaded.model), (saved.optimizer, loaded.optimizer)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)


def test_only_safetensors_and_json(tmp_path):
    path = save_checkpoint(tmp_path, make(7), 2)
    assert sorted(p.name for p in path.iterdir()) == [
        "checksums.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


def test_the_last_few_are_kept(tmp_path):
    for step in (5, 10, 9_999_999, 10_000_000):
        save_checkpoint(tmp_path, make(step), 3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000010", "step_9999999", "step_10000000"]
    assert latest_checkpoint(tmp_path).name == "step_10000000"


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, make(5), 2)
    second = make(5)
    save_checkpoint(tmp_path, second, 2)
    assert torch.equal(load_checkpoint(latest_checkpoint(tmp_path)).model["a"], second.model["a"])


@pytest.mark.parametrize("failing", [(module, "save_tensors"), (module, "write_json"), (files, "flush")], ids=str)
def test_a_crash_while_writing_leaves_the_old_one(tmp_path, monkeypatch, failing):
    save_checkpoint(tmp_path, make(5), 1)

    def crash(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(*failing, crash)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path, make(10), 1)
    assert latest_checkpoint(tmp_path).name == "step_0000005"
    save_checkpoint(tmp_path, make(10), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000010"]


def flip_a_bit(path):
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "truncated": lambda path: os.truncate(path / "optimizer.safetensors", 20),
    "missing file": lambda path: (path / "state.json").unlink(),
    "no checksums": lambda path: (path / "checksums.json").unlink(),
    "checksums cut off": lambda path: (path / "checksums.json").write_text('{"model'),
    "checksums of another kind": lambda path: (path / "checksums.json").write_text("[]"),
    "empty folder": lambda path: [shutil.rmtree(path), path.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_set_aside(tmp_path, damage):
    save_checkpoint(tmp_path, make(5), 3)
    damage(save_checkpoint(tmp_path, make(10), 3))
    with pytest.warns(UserWarning, match=r"step_0000010.*going back to step_0000005"):
        assert latest_checkpoint(tmp_path).name == "step_0000005"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corrupt_step_0000010", "step_0000005"]


def test_all_damaged_is_an_error(tmp_path):
    for step in (5, 10):
        flip_a_bit(save_checkpoint(tmp_path, make(step), 3))
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact.*step_0000010.*step_0000005.*delete"):
        latest_checkpoint(tmp_path)
    assert len(list_checkpoints(tmp_path)) == 2


def test_nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "absent") is None


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    save_checkpoint(tmp_path, make(5), 1)
    bad = make(10)
    bad.model["a"][1, 1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"'a'.*step 10"):
        save_checkpoint(tmp_path, bad, 1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000005"]


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
