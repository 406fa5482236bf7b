"""The cost ledger (methods.md 4): cost of a method relative to the student alone, measured in the same run.

Once, after the warm-up, copies of student and method take timed steps on the same batches, alternating between the
student alone and the student with the method. The extra time is the median over these pairs, with a confidence interval
(pairs.py). The copies are discarded, so the run itself is not affected.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fastkd import assets
from fastkd.progress import track
from fastkd.training.config import Recipe
from fastkd.training.cost.memory import transient_peak
from fastkd.training.cost.pairs import compare
from fastkd.training.optimizers import build_optimizers
from fastkd.training.parallel.compiled import Regions
from fastkd.training.parallel.processes import Processes, no_sync
from fastkd.training.run.directory import read_json
from fastkd.training.schedule import Phase, phase_at
from fastkd.training.step import StepModule, sum_losses
from fastkd.types import Batch

BATCHES = 4  # number of different batches on which the pairs of steps are taken in turn


class _Candidate:
    """A copy of the student, with or without the method, that takes complete training steps."""

    def __init__(
        self, recipe: Recipe, module: StepModule, trainable: frozenset[str], processes: Processes, method: bool
    ):
        distiller, teacher = (module.distiller, module.teacher) if method else (None, None)
        parts = (copy.deepcopy(module.detector), copy.deepcopy(distiller), teacher, module.dtype, module.regions)
        self.module = StepModule(*parts)
        self.module.to(processes.device)
        self.phase = Phase(distill=method)
        self.module.apply_phase(self.phase, trainable)
        self.optimizers = build_optimizers(recipe, self.module)
        self.wrapped = processes.wrap_for(recipe, self.module)
        self.processes = processes

    def step(self, parts: list[Batch], channels_last: bool) -> None:
        """One complete step: forward, backward, update."""
        torch.manual_seed(0)
        for number, part in enumerate(parts, start=1):
            part = part.to(self.processes.device, memory_format=torch.channels_last if channels_last else None)
            with no_sync(self.wrapped, number < len(parts)):
                (sum_losses(self.wrapped(part, self.phase)) / len(parts)).backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def timed(self, parts: list[Batch], channels_last: bool) -> float:
        """Time of one step, seconds."""
        self._wait()
        begin = time.perf_counter()
        self.step(parts, channels_last)
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize(self.processes.device)

    def resident(self) -> list[Tensor]:
        """Tensors that persist between steps: weights, batch statistics, optimiser states, the frozen teacher."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        tensors += [value for optimizer in self.optimizers for value in optimizer.tensors().values()]
        if self.module.teacher is not None:
            tensors += [*self.module.teacher.detector.parameters(), *self.module.teacher.detector.buffers()]
        return tensors

    def peak(self, parts: list[Batch], channels_last: bool) -> int:
        """Peak memory of a step, bytes; on the CPU measured without torch.compile."""
        resident, regions = self.resident(), self.module.regions
        if self.processes.device.type == "cpu":
            self.module.regions = Regions()  # the meter cannot see tensors inside a compiled graph
        try:
            transient = transient_peak(lambda: self.step(parts, channels_last), self.processes.device, resident)
        finally:
            self.module.regions = regions
        return sum(t.numel() * t.element_size() for t in resident) + transient


def measure(
    recipe: Recipe,
    module: StepModule,
    trainable: frozenset[str],
    batches: list[list[Batch]],
    processes: Processes,
) -> dict[str, Any]:
    """Measures time and peak memory of steps of the student alone and with the method; all processes call it.

    Args:
        recipe: recipe of the run; without a method only the student is measured.
        module: module of the run, not changed.
        trainable: names of its trainable parameters.
        batches: batches of a few steps, each as a list of micro-batches.
        processes: processes of the run.
    Returns: {"student": {...}, "with_method": {...}, "extra": {...}, ...}; times are medians, and those of "extra" are
        medians over the pairs with confidence intervals, see pairs.compare.
    """
    names = ["student", "with_method"] if recipe.method is not None else ["student"]
    candidates = {n: _Candidate(recipe, module, trainable, processes, n == "with_method") for n in names}
    layout = recipe.runtime.channels_last
    samples: dict[str, list[float]] = {name: [] for name in names}
    for candidate in candidates.values():
        candidate.step(batches[0], layout)
    peaks = {name: candidate.peak(batches[0], layout) for name, candidate in candidates.items()}
    pairs = track(range(recipe.runtime.ledger_pairs), "measure the cost", "pairs of steps")
    for pair, parts in zip(pairs, itertools.cycle(batches)):
        for name in names if pair % 2 == 0 else reversed(names):
            samples[name].append(candidates[name].timed(parts, layout))
    rows: dict[str, dict[str, Any]] = {
        name: {"seconds_per_step": statistics.median(taken), "peak_bytes": peaks[name], "samples": taken}
        for name, taken in samples.items()
    }
    extra: dict[str, Any] = {"seconds_per_step": 0.0, "peak_bytes": 0}
    if recipe.method is not None:
        extra = {**compare(*samples.values()), "peak_bytes": peaks["with_method"] - peaks["student"]}
    rows.setdefault("with_method", rows["student"])
    return {
        **rows,
        "extra": extra,
        "images_per_step": recipe.schedule.batch_size,
        "processes": processes.world_size,
        "device": _device_name(processes.device),
        "threads": torch.get_num_threads(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def teacher_cost(teacher: str) -> dict[str, Any]:
    """Cost of training a teacher, read from its run directory or from a JSON file beside the weights.

    Returns: {"file", "steps", "seconds"}; None where unknown.
    """
    path = assets.resolve(teacher)
    metrics = read_json(path.with_suffix(".json")) or read_json(path.parent / "metrics.json") or {}
    return {"file": teacher, "steps": metrics.get("steps"), "seconds": metrics.get("seconds")}


def totals(recipe: Recipe, measured: dict[str, Any]) -> dict[str, Any]:
    """The complete ledger: the measured step costs, extrapolated to the run, without and with the teacher's training.

    Adds "run": seconds of the student and extra seconds of the method over the run (only distilling steps cost extra),
    "teacher", and "extra_with_teacher": {"seconds", "seconds_per_step", "seconds_interval"}, None if the teacher's cost
    is unknown. The intervals are those of the extra time; the teacher's training is taken as exact.
    """
    steps = recipe.schedule.steps
    distilled = sum(phase_at(recipe, step).distill for step in range(steps))
    extra = measured["extra"]["seconds_per_step"] * distilled
    ends = measured["extra"].get("seconds_interval")
    interval = None if ends is None else [end * distilled for end in ends]
    run = {
        "steps": steps,
        "distilled_steps": distilled,
        "student_seconds": measured["student"]["seconds_per_step"] * steps,
        "extra_seconds": extra,
        "extra_interval": interval,
    }
    teacher = teacher_cost(recipe.teacher) if recipe.teacher is not None else None
    seconds = 0.0 if teacher is None else teacher["seconds"]
    whole = None if seconds is None else extra + seconds
    with_teacher = {
        "seconds": whole,
        "seconds_per_step": None if whole is None else whole / steps,
        "interval": None if seconds is None or interval is None else [end + seconds for end in interval],
    }
    method = recipe.to_dict()["method"]
    label = {"method": method["kind"] if method else None, "inherit": recipe.inherit}
    return {**label, **measured, "run": run, "teacher": teacher, "extra_with_teacher": with_teacher}


def interval_text(ends: Sequence[float]) -> str:
    """An interval of seconds of the whole run."""
    return " .. ".join(f"{end:+,.0f}" for end in ends) + " s"


def ledger_table(name: str, ledger: dict[str, Any]) -> Table:
    """The ledger for the terminal."""
    table = Table(title=Text(f"Cost of {name}", style="table.title"), header_style="bold")
    for column in ("", "seconds/step", "peak memory", "whole run"):
        table.add_column(column, justify="right" if column else "left")
    run, student, method, whole = (ledger[key] for key in ("run", "student", "with_method", "extra_with_teacher"))

    def row(label: str, entry: dict[str, Any], seconds: float | None, sign: str = "") -> None:
        per_step, peak = entry["seconds_per_step"], entry.get("peak_bytes")
        table.add_row(
            label,
            "unknown" if per_step is None else f"{per_step:{sign}.3f}",
            "" if peak is None else f"{peak / 2**20:{sign},.0f} MiB",
            "unknown" if seconds is None else f"{seconds:{sign},.0f} s",
        )

    row("student alone", student, run["student_seconds"])
    if ledger["method"] is not None:
        row("with the method", method, run["student_seconds"] + run["extra_seconds"])
        row("extra", ledger["extra"], run["extra_seconds"], "+")
        low, high = ledger["extra"].get("seconds_interval") or (None, None)
        if low is not None:
            table.add_row("  95 % interval", f"{low:+.3f} .. {high:+.3f}", "", interval_text(run["extra_interval"]))
    if ledger["teacher"] is not None:
        row("extra with the teacher's training", whole, whole["seconds"], "+")
    return table
