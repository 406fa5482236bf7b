"""Output of a run during training: a progress bar, TensorBoard scalars, one JSON line per log interval."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from fastkd.files import naming, read_json_lines, write_text
from fastkd.progress import is_quiet
from fastkd.training.run.directory import read_json


class Interval:
    """Sums of scalars since the last log line, kept on their device to avoid a synchronisation per step."""

    def __init__(self) -> None:
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds one step's scalars. A scalar that is missing in some steps (other phases) counts as 0 there."""
        self.steps += 1
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def state(self, mean: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The sums as JSON numbers, without rounding.

        Args:
            mean: averages a CPU tensor over all processes.
        """
        sums = torch.tensor([value.item() for value in self.sums.values()], dtype=torch.float64)
        return {"steps": self.steps, "sums": dict(zip(self.sums, mean(sums).tolist()))}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Restores the result of `state`."""
        self.steps = state["steps"]
        self.sums = {n: torch.tensor(v, dtype=torch.float64, device=device) for n, v in state["sums"].items()}

    def take(self) -> dict[str, float]:
        """Returns the means and resets the sums."""
        names = list(self.sums)
        means = (torch.stack([self.sums[n] for n in names]) / max(self.steps, 1)).tolist() if names else []
        self.steps, self.sums = 0, {}
        return dict(zip(names, means))


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl that have a step, and metrics.json of a finished run as the last one."""
    log, metrics = run_dir / "log.jsonl", read_json(run_dir / "metrics.json")
    records = read_json_lines(log)[0] if log.is_file() else []
    if isinstance(metrics, dict) and "steps" in metrics:  # a teacher that was only evaluated has none
        records.append(metrics | {"step": metrics["steps"]})
    return [record for record in records if isinstance(record.get("step"), int)]


class Stopwatch:
    """Time spent in training steps, excluding logging, checkpoints and evaluations.

    Args:
        total: seconds spent before the run was resumed.

    Attributes:
        total: total seconds.
        steps: steps since the last lap; incremented by the caller.
    """

    def __init__(self, total: float):
        self.total, self.steps = total, 0
        self._lap = self._waited = 0.0
        self.resume()

    def resume(self) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock and adds the elapsed time."""
        passed = time.perf_counter() - self._since
        self.total += passed
        self._lap += passed

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def take_lap(self) -> tuple[float, float, int]:
        """Returns seconds, seconds waited and steps since the last lap, and starts a new lap."""
        lap = self._lap, self._waited, self.steps
        self._lap, self._waited, self.steps = 0.0, 0.0, 0
        return lap


class RunLog:
    """log.jsonl and TensorBoard of a run.

    Args:
        run_dir: the run directory.
        start_step: finished steps; later records, of a run that crashed before its next checkpoint, are dropped.

    Attributes:
        evaluated: whether the log holds an evaluation of `start_step`.
    """

    def __init__(self, run_dir: Path, start_step: int):
        self.path = run_dir / "log.jsonl"
        self.evaluated = False
        if self.path.is_file():
            self._drop_after(start_step)
        self.file = self.path.open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 writes

        self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1)

    def _drop_after(self, step: int) -> None:
        records = [one for one in read_json_lines(self.path)[0] if isinstance(one.get("step"), int)]
        kept = [one for one in records if one["step"] <= step]
        self.evaluated = bool(kept) and kept[-1]["step"] == step and "bbox" in kept[-1]
        write_text(self.path, "".join(json.dumps(one) + "\n" for one in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Writes one line; its numbers, nested ones included, become TensorBoard scalars."""
        with naming(self.path):
            self.file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self.file.flush()
        for name, value in _scalars(record):
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flushes and closes log.jsonl and TensorBoard."""
        try:
            with naming(self.path):
                self.file.close()
        finally:
            self.writer.close()


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON cannot represent (an infinite gradient norm) by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            found.append((prefix + key, float(value)))
    return found


class RunProgress:
    """A progress bar with rate, time left and loss on a terminal; otherwise one line per log interval.

    Args:
        name: name of the run.
        steps: steps of the whole run.
        start_step: finished steps.
        console: console to write to.
        shown: False prints nothing (all ranks but the first); --quiet prints nothing either.
    """

    def __init__(self, name: str, steps: int, start_step: int, console: Console, shown: bool):
        self.name, self.steps, self.console, self.shown = name, steps, console, shown and not is_quiet()
        self.bar: Progress | None = None
        if self.shown and console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                console=console,
                refresh_per_second=2,
                speed_estimate_period=60.0,
            )
            self.bar.start()
            self.task = self.bar.add_task(name, total=steps, completed=start_step, rate="", loss="")

    def advance(self) -> None:
        """Advances the bar by one step."""
        if self.bar is not None:
            self.bar.advance(self.task)

    def report(self, record: dict[str, Any]) -> None:
        """Shows a log record."""
        loss, rate = f"loss {record['loss']:.3f}", f"{record['images_per_second']:.1f} images/s"
        rate += f" (loader {record['loader_images_per_second']:.1f}, waits {record['data_wait']:.0%})"
        if self.bar is not None:
            self.bar.update(self.task, loss=loss, rate=rate)
        elif self.shown:
            left = (self.steps - record["step"]) * record["seconds_per_step"]
            self.console.print(
                f"{self.name}  step {record['step']}/{self.steps}  {loss}  {rate}  {left:.0f} s left",
                highlight=False,
                markup=False,
            )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Hides the bar during the block, so that another bar can be shown."""
        if self.bar is not None:
            self.bar.stop()
        yield
        if self.bar is not None:
            self.bar.start()

    def close(self) -> None:
        """Removes the bar and restores the terminal."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
