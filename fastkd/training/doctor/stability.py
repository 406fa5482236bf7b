"""The doctor's check of training stability: the optimiser's settings, and the loss jumps of an earlier run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastkd.training.config import Recipe
from fastkd.training.doctor.finding import Finding
from fastkd.training.run.jumps import RISE, WINDOW, remedy
from fastkd.training.run.logging import read_log


def check_stability(recipe: Recipe, run_dir: Path | None = None) -> Iterator[Finding]:
    """Whether the student's gradients are clipped, and whether the loss of an earlier run jumped.

    Args:
        recipe: the recipe to be trained.
        run_dir: directory of a run of the recipe, finished or not; None checks the settings only.
    """
    optimizer = recipe.optimizer
    if optimizer.kind == "adamw" and optimizer.clip_norm is None:
        text = "AdamW without clipping: one rare gradient can undo hundreds of steps; pass --optimizer.clip-norm 2"
        yield Finding("warning", "stability", text)
    if run_dir is None:
        return
    counts = [(one["step"], one["jumps"]) for one in read_log(run_dir) if isinstance(one.get("jumps"), int)]
    if not counts:
        yield Finding("problem", "stability", f"{run_dir} must hold the log.jsonl of a run, got none that counts jumps")
        return
    last, jumps = counts[-1]
    if jumps == 0:
        yield Finding("ok", "stability", f"the loss of {run_dir} did not jump in {last} steps")
        return
    steps = [step for (step, count), (_, before) in zip(counts, [(0, 0), *counts]) if count > before]
    where = f"{jumps} time(s) in {last} steps of {run_dir}, by step {', '.join(map(str, steps))}"
    what = f"means over {WINDOW} steps rose by more than {RISE:.0%}"
    yield Finding("warning", "stability", f"the loss jumped {where} ({what}); {remedy(optimizer)}")
