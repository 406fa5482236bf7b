"""Jumps of the loss are counted, survive a resume, and are reported by the trainer and the doctor."""

import dataclasses
import json
import math

import pytest
import torch
from tiny_runs import make_tiny_data, silent, tiny_recipe

from fastkd.training import get_recipe, parse_cli, train
from fastkd.training import trainer as trainer_module
from fastkd.training.config import OptimizerConfig, RuntimeConfig, Schedule
from fastkd.training.doctor.stability import check_stability
from fastkd.training.methods import LGDConfig
from fastkd.training.run import jumps as module
from fastkd.training.run.jumps import JumpCounter, describe, remedy
from fastkd.training.run.logging import read_log

STEPS, WARMUP = 400, 20


def smooth(step: int) -> float:
    """A loss that falls from 3 to 1, with some noise."""
    return 1 + 2 * math.exp(-step / 80) + 0.1 * math.sin(7 * step)


def planted(step: int, peaks: tuple[int, ...] = (200,)) -> float:
    """The same with twice the loss at each peak, back on its course 50 steps before and after."""
    return smooth(step) * (1 + sum(max(0.0, 1 - abs(step - peak) / 50) for peak in peaks))


def count(losses, warmup=WARMUP, every=20) -> JumpCounter:
    counter = JumpCounter(warmup)
    for step, loss in enumerate(losses):
        counter.add(torch.tensor(loss))
        if step % every == 0:
            counter.read(lambda values: values)
    counter.read(lambda values: values)
    return counter


def test_a_smooth_run_has_no_jump():
    counter = count(map(smooth, range(STEPS)))
    assert counter.summary()["count"] == 0 and 0 <= counter.largest_rise < 0.05


def test_a_planted_jump_is_found_once():
    counter = count(map(planted, range(STEPS)))
    (jump,) = counter.found
    assert 150 < jump.step < 210 and jump.mean > 1.15 * jump.lowest
    means = [math.fsum(map(planted, range(step - 50, step))) / 50 for step in range(WARMUP + 50, STEPS + 1)]
    lowest = [min(means[:number]) for number in range(1, len(means))]
    rises = [mean / low - 1 for low, mean in zip(lowest, means[1:])]
    first = next(number for number, rise in enumerate(rises) if rise > 0.15)
    assert jump.step == WARMUP + 50 + first + 1
    assert counter.largest_rise == pytest.approx(max(rises), rel=1e-6)
    assert counter.summary() == {"count": 1, "steps": [jump.step], "largest_rise": counter.largest_rise}


def test_a_second_jump_counts_when_the_first_is_over():
    counter = count([planted(step, peaks=(160, 320)) for step in range(STEPS)])
    assert [110 < counter.found[0].step < 160, 270 < counter.found[1].step < 320, len(counter.found)] == [True, True, 2]


def test_the_warm_up_does_not_count():
    losses = [1.0] * 60 + [2.0] * 100
    assert len(count(losses, warmup=60).found) == 0
    assert [jump.step for jump in count(losses, warmup=0).found] == [68]  # 8 of 50 at 2 make a mean of 1.16


def test_when_it_is_read_changes_nothing():
    often, rarely = (count(map(planted, range(STEPS)), every=every) for every in (1, 1000))
    assert often.state() == rarely.state()


@pytest.mark.parametrize("stop", [0, 10, 60, 172, 190, 399])
def test_state_continues_the_count(stop):
    """Stopped before the first window, inside the jump and after it."""
    first = count(map(planted, range(stop)))
    second = JumpCounter(WARMUP)
    second.load_state(json.loads(json.dumps(first.state())))
    new = []
    for step in range(stop, STEPS):
        second.add(torch.tensor(planted(step)))
        new += second.read(lambda values: values)
    whole = count(map(planted, range(STEPS)))
    assert second.state() == whole.state() and first.found + new == whole.found


def test_unread_steps_are_not_lost_without_a_word():
    counter = JumpCounter(0)
    counter.add(torch.tensor(1.0))
    with pytest.raises(ValueError, match="must be read before state"):
        counter.state()


def test_the_mean_over_processes_is_what_counts():
    counter = JumpCounter(0)
    for step in range(120):
        counter.add(torch.tensor(1.0 if step < 60 else 1.4))
        counter.read(lambda values: (values + 1) / 2)  # another process whose loss stays at 1
    assert [jump.step for jump in counter.found] == [98]  # at 1.2 instead of 1.4 it takes 38 steps, not 19


def test_remedies_name_options_and_values():
    text = remedy(OptimizerConfig(learning_rate=2e-3, warmup=0.05))
    assert "--optimizer.learning-rate 0.002" in text and "--optimizer.clip-norm 2" in text and "0.05" in text
    assert "below --optimizer.clip-norm 0.5" in remedy(OptimizerConfig(clip_norm=0.5))
    jump = module.Jump(step=170, mean=1.8, lowest=1.5)
    assert "from 1.5 to 1.8 by step 170" in describe(jump, OptimizerConfig())


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory)


@pytest.fixture
def short_windows(monkeypatch):
    """Windows of two steps and a limit that any rise of the loss passes."""
    monkeypatch.setattr(module, "WINDOW", 2)
    monkeypatch.setattr(module, "RISE", 0.0)


def stop_after(monkeypatch, step):
    """Ends the run after step `step` as a signal would."""
    original = trainer_module.Trainer._take_step
    monkeypatch.setattr(
        trainer_module.Trainer, "_take_step", lambda self, parts: original(self, parts) or 15 * (self.step == step)
    )


def test_a_run_that_jumps_says_so_and_remembers(tiny_data, tmp_path, monkeypatch, short_windows):
    """A rate far too high: warnings, log, metrics; the same after a stop and a resume."""
    hot = OptimizerConfig(kind="adamw", learning_rate=0.3, decay="cosine", warmup=0.0)
    runtime = RuntimeConfig(precision="float32", log_every=2, checkpoint_every=3, ledger_pairs=0)
    recipe = tiny_recipe(tiny_data, optimizer=hot, schedule=Schedule(steps=8, batch_size=2), runtime=runtime)
    consoles = [silent(), silent()]
    result = train(recipe, tmp_path / "whole", device="cpu", console=consoles[0])
    jumps = result.metrics["jumps"]
    assert jumps["count"] == len(jumps["steps"]) >= 1 and jumps["largest_rise"] > 0
    assert consoles[0].file.getvalue().count("--optimizer.clip-norm 2") == jumps["count"]
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [line["jumps"] for line in lines] == [sum(s <= line["step"] for s in jumps["steps"]) for line in lines]

    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert train(recipe, tmp_path / "halves", device="cpu", console=consoles[1]).status == "interrupted"
    resumed = train(recipe, tmp_path / "halves", device="cpu", console=consoles[1], resume=True)
    assert resumed.metrics["jumps"] == jumps
    assert consoles[1].file.getvalue().count("--optimizer.clip-norm 2") == jumps["count"]


def test_a_method_s_losses_do_not_count(tiny_data, tmp_path, monkeypatch, short_windows):
    """The detector's losses are the same numbers beside a method that does not touch it as without it."""
    method = LGDConfig(weight=1.0, instructive_weight=0.0, detach_fraction=1.0, freeze_fraction=0.0, heads=1)
    plain = tiny_recipe(tiny_data)
    taught = dataclasses.replace(plain, method=method, method_optimizer=OptimizerConfig())
    add, seen = JumpCounter.add, []
    monkeypatch.setattr(JumpCounter, "add", lambda self, loss: seen.append(loss.item()) or add(self, loss))
    for recipe, name in ((plain, "baseline"), (taught, "lgd")):
        train(recipe, tmp_path / name, device="cpu", console=silent())
    assert len(seen) == 12 and seen[6:] == pytest.approx(seen[:6], rel=1e-3)
    total = json.loads((tmp_path / "lgd/log.jsonl").read_text().splitlines()[0])["loss"]
    assert total > 1.01 * sum(seen[6:8]) / 2


def test_published_recipes_can_be_clipped():
    """Clipping is an option of every recipe, and off in the published ones of SGD."""
    for name in ("coco-retinanet-baseline", "coco-faster-rcnn-lgd", "crowdhuman-faster-rcnn-baseline"):
        assert get_recipe(name).optimizer.clip_norm is None
        assert parse_cli(name, ["--optimizer.clip-norm", "2"]).optimizer.clip_norm == 2


def findings(recipe, run_dir=None, status=None):
    return [one.message for one in check_stability(recipe, run_dir) if status in (None, one.status)]


def test_the_doctor_reads_an_earlier_run(tmp_path):
    recipe = get_recipe("coco-retinanet-baseline")
    assert findings(recipe) == []
    assert "got none" in findings(recipe, tmp_path, "problem")[0]
    log = tmp_path / "log.jsonl"
    records = [{"step": 20, "jumps": 0}, {"step": 40, "jumps": 0}, {"step": 40, "bbox": {"AP": 1.0}}]
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 60, "ju')
    assert "did not jump in 40 steps" in findings(recipe, tmp_path, "ok")[0]
    records += [{"step": 60, "jumps": 1}, {"step": 80, "jumps": 1}, {"step": 100, "jumps": 2}]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    (text,) = findings(recipe, tmp_path, "warning")
    assert "jumped 2 time(s) in 100 steps" in text and "by step 60, 100" in text and "--optimizer.clip-norm 2" in text


def test_the_doctor_asks_for_clipping_beside_adamw():
    recipe = get_recipe("coco-retinanet-baseline")
    adamw = dataclasses.replace(recipe.optimizer, kind="adamw")
    clipped = dataclasses.replace(adamw, clip_norm=2.0)
    assert "--optimizer.clip-norm 2" in findings(dataclasses.replace(recipe, optimizer=adamw), status="warning")[0]
    assert findings(dataclasses.replace(recipe, optimizer=clipped)) == []


def test_a_damaged_log_is_read_as_far_as_possible(tmp_path):
    good = json.dumps({"step": 2, "jumps": 0}).encode()
    (tmp_path / "log.jsonl").write_bytes(
        b"\n".join([good, b"[" * 100_000, b"\xff{", b"", b"[1]", b'{"jumps": 1}', b'{"st'])
    )
    (tmp_path / "metrics.json").write_text('{"bbox": {"AP": 1.0}}')  # of a teacher that was only evaluated
    assert read_log(tmp_path) == [{"step": 2, "jumps": 0}]
