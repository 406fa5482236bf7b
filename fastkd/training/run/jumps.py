"""Detects jumps of the loss: an unstable run can undo in a few steps the progress of hundreds of steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastkd.training.config import OptimizerConfig, Recipe
from fastkd.training.parallel.processes import Processes

WINDOW = 50  # steps of the moving average
RISE = 0.15  # a moving average this fraction above its minimum so far is a jump


@dataclass(frozen=True)
class Jump:
    """A rise of the loss.

    Args:
        step: number of finished steps when the moving average exceeded the limit.
        mean: moving average of the loss over the last WINDOW steps.
        lowest: minimum of the moving average before.
    """

    step: int
    mean: float
    lowest: float


class JumpCounter:
    """Counts jumps of the detector's own loss, which is comparable between runs with and without a method.

    A jump begins when the moving average over WINDOW steps exceeds its minimum so far by more than the fraction RISE,
    and lasts until the average is back below that limit. Warm-up steps are ignored.

    Args:
        warmup_steps: number of first steps to ignore.

    Attributes:
        found: the jumps in order.
        largest_rise: maximum of moving average / minimum before it - 1; 0 if the average never rose.
    """

    def __init__(self, warmup_steps: int):
        self.warmup_steps = warmup_steps
        self.found: list[Jump] = []
        self.largest_rise = 0.0
        self._step = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._lowest = math.inf
        self._above = False
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Records the scalar loss of the next step on its device; `read` synchronises."""
        self._unread.append(loss.detach())

    def read(self, mean: Callable[[Tensor], Tensor]) -> list[Jump]:
        """Evaluates the steps added since the last call and returns the jumps that begin in them.

        Args:
            mean: averages a CPU tensor over all processes; every process calls `read` after the same steps.
        """
        if not self._unread:
            return []
        losses = mean(torch.stack(self._unread).double().cpu()).tolist()
        self._unread = []
        new = [jump for loss in losses if (jump := self._advance(loss)) is not None]
        self.found += new
        return new

    def warn(self, recipe: Recipe, group: Processes, console: Console) -> None:
        """Evaluates the steps added since the last call and prints each new jump; all processes call it."""
        for jump in self.read(group.mean):
            if group.first:
                console.print(f"{recipe.name}: {describe(jump, recipe.optimizer)}", highlight=False, markup=False)

    def _advance(self, loss: float) -> Jump | None:
        self._step += 1
        if self._step <= self.warmup_steps:
            return None
        self._recent.append(loss)
        if len(self._recent) < WINDOW:
            return None
        mean, lowest, was_above = math.fsum(self._recent) / WINDOW, self._lowest, self._above
        self._lowest = min(lowest, mean)
        self._above = mean > (1 + RISE) * lowest
        if 0 < lowest < math.inf:
            self.largest_rise = max(self.largest_rise, mean / lowest - 1)
        return Jump(self._step, mean, lowest) if self._above and not was_above else None

    def summary(self) -> dict[str, Any]:
        """The entry of metrics.json: number and steps of the jumps, and the largest rise."""
        steps = [jump.step for jump in self.found]
        return {"count": len(steps), "steps": steps, "largest_rise": self.largest_rise}

    def state(self) -> dict[str, Any]:
        """The state after the last `read`, as JSON types; raises ValueError if steps were added since."""
        if self._unread:
            raise ValueError(f"JumpCounter: all steps must be read before state(), got {len(self._unread)} unread")
        return {
            "step": self._step,
            "recent": list(self._recent),
            "lowest": None if self._lowest == math.inf else self._lowest,
            "above": self._above,
            "found": [asdict(jump) for jump in self.found],
            "largest_rise": self.largest_rise,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the result of `state`."""
        self._step, self._above, self.largest_rise = state["step"], state["above"], state["largest_rise"]
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._lowest = math.inf if state["lowest"] is None else state["lowest"]
        self.found = [Jump(**jump) for jump in state["found"]]
        self._unread = []


def remedy(optimizer: OptimizerConfig) -> str:
    """Suggests changes to a recipe whose loss jumps."""
    clip = "clip gradients (--optimizer.clip-norm 2)"
    if optimizer.clip_norm is not None:
        clip = f"clip gradients below --optimizer.clip-norm {optimizer.clip_norm:g}"
    rate = f"lower --optimizer.learning-rate {optimizer.learning_rate:g}"
    return f"{rate}, {clip}, or warm up for longer than --optimizer.warmup {optimizer.warmup:.3g}"


def describe(jump: Jump, optimizer: OptimizerConfig) -> str:
    """The warning for one jump."""
    rise = f"from {jump.lowest:.3g} to {jump.mean:.3g} by step {jump.step}"
    return f"the detector's loss jumped (its mean over {WINDOW} steps rose {rise}); {remedy(optimizer)}"
