"""Faults of the disk and the clock: full, read-only, damaged checkpoints, a time of day that jumps back.

Each function yields one dict per case: what was done (`fault`), what fastkd said (`said`), and the `problem`, "" if the
fault was survived or refused as it should be.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import tiny
from benchmarks.faults.kills import undisturbed
from fastkd.training import Recipe
from fastkd.training import trainer as trainer_module
from fastkd.training.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
)

Case = dict[str, Any]
NOW = time.time
FULL, READ_ONLY = "No space left on device", "Read-only file system"


def expect(ended: tiny.Ended, code: int, *words: str) -> str:
    """The problem of an ended command, "" if its exit code is `code` and its last line has the words (all its
    output after an exit code of 0).
    """
    said = ended.last if code else ended.said  # a run that goes on warns before its last line
    missing = [word for word in words if word not in said]
    if ended.code == code and not missing and "Traceback" not in ended.said:
        return ""
    return f"exit code {ended.code} instead of {code}, without {missing}: {ended.said[-1500:]}"


def at_step(step: int, action: Callable[[], None]) -> Callable[[], None]:
    """A function that makes training call `action` before a step, in this process."""

    def install() -> None:
        original = trainer_module.Trainer._take_step

        def take_step(self: Any, parts: Any) -> int:
            if self.step == step:
                action()
            return original(self, parts)

        trainer_module.Trainer._take_step = take_step  # type: ignore[method-assign]

    return install


def store(folder: Path, wanted: Recipe) -> Path:
    """The recipe as a file for `fastkd train`."""
    path = folder / f"{wanted.name}-{wanted.schedule.steps}.json"
    path.write_text(json.dumps(wanted.to_dict()), encoding="utf-8")
    return path


def train(recipe: Path, run_dir: Path, before: Callable[[], None] | None = None) -> tiny.Ended:
    """`fastkd train --resume` in a forked process."""
    return tiny.command("train", recipe, "--run-dir", run_dir, "--device", "cpu", "--resume", before=before)


def resumed(recipe: Path, run_dir: Path, reference: dict[str, Any]) -> str:
    """Resumes a run to its end; the difference from the undisturbed one."""
    ended = train(recipe, run_dir)
    return f"resumed: {ended.said[-1500:]}" if ended.code else tiny.difference(reference, tiny.result(run_dir))


def folder_size(folder: Path) -> int:
    """Bytes of all files, each rounded up to a page, as tmpfs counts them."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def inside(folder: Path, size: int, cases: Callable[[], Iterator[Case]]) -> list[Case]:
    """The cases of a function that runs in a process with a tmpfs of `size` bytes mounted on `folder`."""
    answer = folder.with_suffix(".cases")

    def collect() -> None:
        tiny.mount_private(folder, size)
        answer.write_text(json.dumps(list(cases())), encoding="utf-8")

    folder.mkdir(exist_ok=True)
    ended = tiny.call(collect, patience=900)
    if ended.code:
        return [{"fault": f"a tmpfs of {size} bytes", "said": ended.last, "problem": ended.said[-1500:]}]
    return json.loads(answer.read_text(encoding="utf-8"))


def full_disk(folder: Path, wanted: Recipe, seed: int) -> Iterator[Case]:
    """Disks that become full while training, at 24 sizes; then while evaluating, exporting and writing a report."""
    reference, _ = undisturbed(folder, wanted)
    recipe, whole, disk, rng = store(folder, wanted), folder / "whole", folder / "disk", random.Random(seed)
    needed = folder_size(whole)

    def training(share: float) -> Iterator[Case]:
        run_dir = disk / "run"
        ended = train(recipe, run_dir)
        problem = expect(ended, 2, FULL, str(disk), "--resume") if ended.code else ""
        tiny.remount(disk, size=8 * needed)
        problem = problem or resumed(recipe, run_dir, reference)
        fault = f"full after {share:.0%} of the run's bytes" if ended.code else f"{share:.0%} of the bytes: enough"
        yield {"fault": fault, "said": ended.last, "problem": problem}

    for number in range(24):
        share = (number + rng.random()) / 24
        yield from inside(disk, max(4096, int(share * needed)), lambda share=share: training(share))
    yield from inside(disk, 8 * 4096, lambda: other_commands(disk, wanted, whole, FULL))


def other_commands(disk: Path, wanted: Recipe, whole: Path, words: str, prepare: bool = True) -> Iterator[Case]:
    """Evaluating, exporting and a report, whose earlier output must survive that they cannot write."""
    data, old = Path(wanted.data.root), "earlier output"
    outputs = {"metrics.json": disk / "metrics.json", "report.html": disk / "report.html"}
    export = disk / "export"
    if prepare:
        export.mkdir()
        outputs["export"] = export / "model.safetensors"
        for path in outputs.values():
            path.write_text(old, encoding="utf-8")
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    files = ["--annotations", data / wanted.data.val_annotations, "--images", data / wanted.data.val_images]
    commands: dict[str, list[str | Path]] = {
        "evaluate": ["evaluate", whole, *files, "--out", outputs["metrics.json"], "--device", "cpu"],
        "export": ["export", whole, "--out", export, "--no-onnx"],
        "report": ["report", whole, "--out", outputs["report.html"], "--images", "2"],
        "report with pictures": ["report", whole, "--out", outputs["report.html"], "--pictures", disk / "pictures"],
    }
    for name, args in commands.items():
        ended = tiny.command(*args)
        problem = expect(ended, 2, words, str(disk))
        changed = [path.name for path in outputs.values() if path.read_text(encoding="utf-8") != old]
        if not problem and changed:
            problem = f"changed {changed}"
        yield {"fault": name, "said": ended.last, "problem": problem}


def read_only(folder: Path, wanted: Recipe, seed: int) -> Iterator[Case]:
    """A file system that is read-only from the start, or when a killed run is resumed; the seed is not used.

    Linux does not let a file system with open files be made read-only, so it cannot become so during a run.
    """
    reference, _ = undisturbed(folder, wanted)
    recipe, whole, disk = store(folder, wanted), folder / "whole", folder / "disk"

    def cases() -> Iterator[Case]:
        run_dir = disk / "run"
        for step in (1, 3, 6):
            train(recipe, run_dir, at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            time.sleep(6)  # loader processes notice within five seconds that their parent has died
            tiny.remount(disk, read_only=True)
            ended = train(recipe, run_dir)
            problem = expect(ended, 2, READ_ONLY, str(disk))
            tiny.remount(disk, size=512 << 20)
            problem = problem or resumed(recipe, run_dir, reference)
            yield {"fault": f"read-only after a kill in step {step + 1}", "said": ended.last, "problem": problem}
            shutil.rmtree(run_dir)
        for name in ("metrics.json", "report.html"):
            (disk / name).write_text("earlier output", encoding="utf-8")
        (disk / "export").mkdir()
        tiny.remount(disk, read_only=True)
        ended = train(recipe, run_dir)
        yield {
            "fault": "read-only from the start",
            "said": ended.last,
            "problem": expect(ended, 2, READ_ONLY, str(run_dir)),
        }
        yield from other_commands(disk, wanted, whole, READ_ONLY, prepare=False)

    yield from inside(disk, 512 << 20, cases)


def clock(folder: Path, wanted: Recipe, seed: int) -> Iterator[Case]:
    """20 runs in which the time of day jumps back by up to a year, stopped and resumed with file times in disorder."""
    reference, _ = undisturbed(folder, wanted)
    recipe, rng = store(folder, wanted), random.Random(seed)
    for number in range(20):
        jump, calls, step = rng.uniform(1, 3e7), rng.randint(0, 40), rng.randint(1, 7)

        def back(jump: float = jump, calls: int = calls, step: int = step) -> None:
            left = [calls]

            def jumping() -> float:
                left[0] -= 1
                return NOW() - (jump if left[0] < 0 else 0)

            time.time = jumping
            at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))()

        run_dir = folder / "clock"
        shutil.rmtree(run_dir, ignore_errors=True)
        ended = train(recipe, run_dir, back)
        problem = expect(ended, 143, "everything is saved")
        for path in run_dir.rglob("*"):
            os.utime(path, (rng.uniform(0, 2e9),) * 2)
        problem = problem or resumed(recipe, run_dir, reference)
        fault = f"clock {number + 1}: back by {jump / 86400:.0f} days, stopped in step {step + 1}"
        yield {"fault": fault, "said": ended.last, "problem": problem}


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints have the same state and tensors."""
    pairs = ((one.model, other.model), (one.optimizer, other.optimizer))
    equal = all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)
    return equal and (one.step, one.state) == (other.step, other.state)


def damage(path: Path, place: int, places: int, rng: random.Random) -> str:
    """Damages one of `places` equal regions of a file; says how."""
    content = bytearray(path.read_bytes())
    start, end = place * len(content) // places, max((place + 1) * len(content) // places, 1)
    offset = rng.randrange(start, max(end, start + 1)) if content else 0
    kind = rng.choice(("bit", "byte", "block", "cut", "insert"))
    if kind == "bit":
        content[offset] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        content[offset] ^= rng.randrange(1, 256)
    elif kind == "block":
        size = min(len(content) - offset, 512)
        content[offset : offset + size] = bytes(b ^ 0xA5 for b in content[offset : offset + size])
    elif kind == "cut":
        del content[offset:]
    else:
        content[offset:offset] = rng.randbytes(rng.choice((1, 512)))
    path.write_bytes(bytes(content))
    return kind


def checkpoints(folder: Path, wanted: Recipe, seed: int) -> Iterator[Case]:
    """500 damaged checkpoints: 125 equal regions of each of its four files, one damage each. Every 25th is resumed."""
    reference, _ = undisturbed(folder, wanted)
    recipe, rng = store(folder, wanted), random.Random(seed)
    stopped = folder / "stopped"
    shutil.rmtree(stopped, ignore_errors=True)
    train(recipe, stopped, at_step(6, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    newest, before = (path.name for path in reversed(list_checkpoints(stopped / "checkpoints")[-2:]))
    intact, whole = (load_checkpoint(stopped / "checkpoints" / name) for name in (before, newest))
    names = sorted(path.name for path in (stopped / "checkpoints" / newest).iterdir())
    for number in range(500):
        run_dir = folder / "damaged"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(stopped, run_dir)
        name, place = names[number % len(names)], number // len(names)
        kind = damage(run_dir / "checkpoints" / newest / name, place, 500 // len(names), rng)
        fault = f"{name}, region {place}: {kind}"
        if number % 25 == 0:
            ended = train(recipe, run_dir)
            problem = expect(ended, 0, newest, f"going back to {before}")
            problem = problem or tiny.difference(reference | {"files": []}, tiny.result(run_dir) | {"files": []})
            yield {
                "fault": f"{fault}, resumed",
                "said": ended.said.partition("UserWarning: ")[2].partition("\n")[0],
                "problem": problem,
            }
            continue
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                found = latest_checkpoint(run_dir / "checkpoints")
            except CheckpointError as error:
                yield {"fault": fault, "said": str(error), "problem": str(error)}
                continue
        said = " ".join(str(warning.message) for warning in heard)
        problem = "" if found is not None and found.name == before and newest in said else f"took {found}: {said}"
        if found is not None and found.name == newest and name == "checksums.json":  # spelled otherwise
            problem = "" if same(load_checkpoint(found), whole) else "took the damaged one"
        elif not problem and not same(load_checkpoint(found), intact):
            problem = "another content"
        yield {"fault": fault, "said": said, "problem": problem}
