"""The campaigns' own judgement: what counts as said, as damaged, as equal, as within the limits."""

import dataclasses
import random

import pytest
import torch

from benchmarks import load
from benchmarks.faults import storage
from benchmarks.faults.tiny import Ended
from fastkd.training.run.checkpoint import Checkpoint


@pytest.mark.parametrize(
    ("code", "said", "found"),
    [
        (2, "fastkd: error: /disk: No space left on device", ""),
        (1, "fastkd: error: /disk: No space left on device", "exit code 1 instead of 2"),
        (2, "No space left on device\nfastkd: error: something else", "without ['No space"),
        (2, "Traceback (most recent call last):\nfastkd: error: No space left on device", "exit code 2"),
    ],
    ids=["in the last line", "another exit code", "in an earlier line only", "with a traceback"],
)
def test_a_fault_must_be_named_in_the_last_line(code, said, found):
    problem = storage.expect(Ended(code, said, 1.0), 2, "No space left on device")
    assert found in problem and bool(problem) == bool(found)


def test_a_run_that_goes_on_may_warn_anywhere():
    assert storage.expect(Ended(0, "going back to step 4\nfinished", 1.0), 0, "going back") == ""


def test_damage_changes_a_file(tmp_path):
    for number in range(100):
        path = tmp_path / "file"
        path.write_bytes(bytes(range(256)) * 3)
        storage.damage(path, number % 7, 7, random.Random(number))
        assert path.read_bytes() != bytes(range(256)) * 3


def test_equal_checkpoints_have_equal_tensors():
    one = Checkpoint(3, {"weight": torch.ones(2)}, {"mean": torch.zeros(2)}, {"seed": 1})
    assert storage.same(one, dataclasses.replace(one))
    for other in ({"model": {"weight": torch.zeros(2)}}, {"optimizer": {}}, {"state": {}}, {"step": 4}):
        assert not storage.same(one, dataclasses.replace(one, **other))


def test_the_load_page_names_limits_and_commit():
    row = load.Row("train", "a million boxes", 50.0, 2000.0, 100.0, 3000.0, "0123456789ab")
    assert "| train | a million boxes | 50 | 100 | 2,000 | 3,000 | 0123456789ab |" in load.page([row])
    assert row.fits and not dataclasses.replace(row, seconds=101.0).fits
    assert not dataclasses.replace(row, mib=3001.0).fits


def test_the_load_measures_a_command_until_a_pattern():
    waiting = "print('here', flush=True); import time; time.sleep(50)"  # it must live while its memory is read
    seconds, mib = load.run(["timeit", "-n", "1", "-r", "1", waiting], until="here")
    assert 0 < seconds < 60 and 1 < mib < 100
    with pytest.raises(RuntimeError, match="ended with 1"):
        load.run(["no_such_module_of_ours"])
