"""Faults of what a run reads while it runs: images, annotation files, loader processes, the teacher's file.

Each function yields one dict per case, as those of benchmarks/faults/storage.py.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.faults import tiny
from benchmarks.faults.kills import undisturbed
from benchmarks.faults.storage import Case, at_step, expect, resumed, store, train
from fastkd.training import Recipe


def copy_data(folder: Path, wanted: Recipe) -> Recipe:
    """The recipe on a copy of its data."""
    root = folder / "copied"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(wanted.data.root, root)
    return dataclasses.replace(wanted, data=dataclasses.replace(wanted.data, root=str(root)))


def replace_image(path: Path, size: tuple[int, int] | None) -> None:
    """Another picture in the place of an image file, of the same size if `size` is None."""
    with Image.open(path) as image:
        Image.new("RGB", size or image.size, (200, 30, 30)).save(path)


def cut(path: Path) -> None:
    """The first half of a file's bytes."""
    os.truncate(path, path.stat().st_size // 2)


def grow(path: Path) -> None:
    """A file with further bytes at its end."""
    with path.open("ab") as file:
        file.write(b"\0" * 1000)


def to_folder(path: Path) -> None:
    """A folder in the place of a file."""
    path.unlink()
    path.mkdir()


def to_pipe(path: Path) -> None:
    """A named pipe, which nobody writes to, in the place of a file."""
    path.unlink()
    os.mkfifo(path)


IMAGE_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "replaced, another size": (lambda path: replace_image(path, (31, 47)), "the annotation says"),
    "replaced, the same size": (lambda path: replace_image(path, None), "changed after the data set was opened"),
    "cut": (cut, "cannot be read"),
    "grown": (grow, "changed after the data set was opened"),
    "emptied": (lambda path: os.truncate(path, 0), "cannot be read"),
    "deleted": (lambda path: path.unlink(), "cannot be read"),
    "a folder": (to_folder, "not a regular file"),
    "a named pipe": (to_pipe, "not a regular file"),
}
FILE_FAULTS: dict[str, Callable[[Path], None]] = {
    "replaced": lambda path: path.write_text(
        path.read_text(encoding="utf-8").replace('"bbox":[', '"bbox":[1'), "utf-8"
    ),
    "cut": cut,
    "grown": grow,
    "deleted": lambda path: path.unlink(),
}


def images(folder: Path, wanted: Recipe, seed: int) -> Iterator[Case]:
    """Half the images of the training set change during the run: it goes on with what is readable and says so."""
    longer = dataclasses.replace(wanted, schedule=dataclasses.replace(wanted.schedule, steps=24))
    for workers in (0, 1):
        for name, (change, words) in IMAGE_FAULTS.items():
            recipe = copy_data(folder, longer)
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=workers))
            root = Path(recipe.data.root)
            victims = sorted((root / recipe.data.train_images).iterdir())
            some = random.Random(seed).sample(victims, len(victims) // 2)

            def spoil(some: list[Path] = some, change: Callable[[Path], None] = change) -> None:
                for path in some:
                    change(path)

            run_dir = folder / "spoiled"
            shutil.rmtree(run_dir, ignore_errors=True)
            ended = train(store(folder, recipe), run_dir, at_step(2, spoil))
            problem = expect(ended, 0, words, f"{root}/{recipe.data.train_images}/")
            if not problem and words != "changed after the data set was opened":
                unread = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))["train_unreadable"]
                problem = "" if unread else "metrics.json counts no unreadable image"
            said = next((line for line in ended.said.splitlines() if words in line), "")
            yield {"fault": f"images {name}, {workers} workers", "said": said, "problem": problem}


def annotations(folder: Path, wanted: Recipe, seed: int) -> Iterator[Case]:
    """Annotation files that change during the run; the seed is not used."""
    reference, _ = undisturbed(folder, wanted)
    for part, key in (("validation", "val_annotations"), ("training", "train_annotations")):
        for name, change in FILE_FAULTS.items():
            recipe = copy_data(folder, wanted)
            file = Path(recipe.data.root) / getattr(recipe.data, key)
            content, run_dir, stored = file.read_bytes(), folder / "spoiled", store(folder, recipe)
            shutil.rmtree(run_dir, ignore_errors=True)
            stop = 4 if part == "validation" else 5  # training reads the file once: stop it, and resume
            actions = [change] if part == "validation" else [change, lambda _: os.kill(os.getpid(), signal.SIGTERM)]

            def spoil(actions: list = actions, file: Path = file) -> None:
                for action in actions:
                    action(file)

            ended = train(stored, run_dir, at_step(stop, spoil))
            if part == "validation":
                problem = expect(ended, 2, str(file))
            else:
                problem = expect(ended, 143, "everything is saved")
                ended = train(stored, run_dir)
                problem = problem or expect(ended, 2, "data must be" if name == "replaced" else str(file))
            file.write_bytes(content)
            problem = problem or resumed(stored, run_dir, reference)
            yield {"fault": f"{part} annotations {name}", "said": ended.last, "problem": problem}


def dead_worker(folder: Path, wanted: Recipe, seed: int) -> Iterator[Case]:
    """20 runs whose loader process is killed, by SIGKILL, SIGSEGV or SIGBUS, in a random step or in an evaluation."""
    reference, _ = undisturbed(folder, wanted)
    recipe, rng = store(folder, wanted), random.Random(seed)
    for number in range(20):
        signum = rng.choice((signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS))
        step, run_dir = rng.randint(0, 5), folder / "orphan"  # the last steps need no loader any more

        def kill(signum: int = signum) -> None:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signum)
            time.sleep(0.05)

        shutil.rmtree(run_dir, ignore_errors=True)
        ended = train(recipe, run_dir, at_step(step, kill))
        problem = expect(ended, 2, "a loader process died")
        problem = problem or resumed(recipe, run_dir, reference)
        fault = f"worker {number + 1}: {signum.name} in step {step + 1}"
        yield {"fault": fault, "said": ended.last, "problem": problem}


def teacher(folder: Path, wanted: Recipe, seed: int) -> Iterator[Case]:
    """A teacher's file that is swapped, cut or deleted between two parts of a run; the seed is not used."""
    reference, _ = undisturbed(folder, wanted)
    file, other = Path(str(wanted.teacher)), tiny.teacher(Path(wanted.data.root), seed=8)
    content, recipe, run_dir = file.read_bytes(), store(folder, wanted), folder / "taught"
    faults: dict[str, tuple[Callable[[], Any], str]] = {
        "swapped": (lambda: file.write_bytes(other.read_bytes()), "teacher must be the file the run began with"),
        "cut": (lambda: cut(file), str(file)),
        "deleted": (lambda: file.unlink(), str(file)),
        "swapped and back": (lambda: None, ""),
    }
    for name, (change, words) in faults.items():
        shutil.rmtree(run_dir, ignore_errors=True)
        train(recipe, run_dir, at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        try:
            change()
            ended = train(recipe, run_dir)
            problem = expect(ended, 2 if words else 0, words)
        finally:
            file.write_bytes(content)
        problem = problem or resumed(recipe, run_dir, reference)
        yield {"fault": f"teacher {name}", "said": ended.last, "problem": problem}
