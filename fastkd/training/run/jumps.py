"""Jumps of the loss: a run at the edge of stability loses within a few steps what it learned in hundreds."""

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

WINDOW = 50  # steps a mean is taken over
RISE = 0.15  # a mean this much above the smallest one before it is a jump


@dataclass(frozen=True)
class Jump:
    """A rise of the loss.

    Args:
        step: finished steps when the mean passed the limit.
        mean: of the loss over the last WINDOW steps.
        lowest: the smallest such mean before.
    """

    step: int
    mean: float
    lowest: float


class JumpCounter:
    """Counts jumps of the detector's own loss, which is the same sum with and without a method and in all its phases.

    A jump begins where the mean of the last WINDOW steps exceeds the smallest such mean so far by more than RISE, and
    lasts until the mean is back below that limit. Windows begin after the warm-up.

    Args:
        warmup_steps: first steps of the run, which are left out.

    Attributes:
        found: the jumps in order.
        largest_rise: the largest mean relative to the smallest before it, minus 1; 0 if none was above it.
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
        """Takes the loss of the next step, a scalar, and leaves it on its device: nobody waits for it until `read`."""
        self._unread.append(loss.detach())

    def read(self, mean: Callable[[Tensor], Tensor]) -> list[Jump]:
        """Looks at the steps added since the last call and returns the jumps that begin in them.

        Args:
            mean: makes a CPU tensor its mean over all processes; each of them calls `read` after the same steps.
        """
        if not self._unread:
            return []
        losses = mean(torch.stack(self._unread).double().cpu()).tolist()
        self._unread = []
        new = [jump for loss in losses if (jump := self._advance(loss)) is not None]
        self.found += new
        return new

    def warn(self, recipe: Recipe, group: Processes, console: Console) -> None:
        """Reads the steps added since the last call and prints one line for each new jump; all processes call it."""
        for jump in self.read(group.mean):
            if group.first:
                console.print(f"{recipe.name}: {describe(jump, recipe.optimizer)}", highlight=False)

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
        """What metrics.json holds: number and steps of the jumps, and the largest rise."""
        steps = [jump.step for jump in self.found]
        return {"count": len(steps), "steps": steps, "largest_rise": self.largest_rise}

    def state(self) -> dict[str, Any]:
        """Everything that was read, as JSON types; call `read` first."""
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
        """What `state` gave."""
        self._step, self._above, self.largest_rise = state["step"], state["above"], state["largest_rise"]
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._lowest = math.inf if state["lowest"] is None else state["lowest"]
        self.found = [Jump(**jump) for jump in state["found"]]
        self._unread = []


def remedy(optimizer: OptimizerConfig) -> str:
    """What to change in a recipe whose loss jumps."""
    clip = "clip gradients (--optimizer.clip-norm 2)"
    if optimizer.clip_norm is not None:
        clip = f"clip gradients below --optimizer.clip-norm {optimizer.clip_norm:g}"
    rate = f"lower --optimizer.learning-rate {optimizer.learning_rate:g}"
    return f"{rate}, {clip}, or warm up for longer than --optimizer.warmup {optimizer.warmup:.3g}"


def describe(jump: Jump, optimizer: OptimizerConfig) -> str:
    """A warning about one jump."""
    rise = f"from {jump.lowest:.3g} to {jump.mean:.3g} by step {jump.step}"
    return f"the detector's loss jumped (its mean over {WINDOW} steps rose {rise}); {remedy(optimizer)}"
