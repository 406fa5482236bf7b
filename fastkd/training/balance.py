"""Weights that balance themselves (methods 10): keeps the distillation gradient at a given ratio to the detector's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

DECAY = 0.8  # of the running means, per measurement


@dataclass
class Estimate:
    """Running means of one method's gradient norms at the student's pyramid.

    Args:
        losses: names of the method's losses that reach the pyramid; only these are scaled.
        detector: norm of the gradient of the detector's loss.
        method: norm of the gradient of the method's losses before scaling.
        measured: ratio of the two norms in the last measurement, with the factor that was applied in its step.
    """

    losses: list[str]
    detector: float
    method: float
    measured: float = 0.0


class Balance:
    """Scales the losses of each method so that their gradient at the pyramid has `ratio` times the detector's norm.

        factor = ratio * mean |d L_detector / d pyramid| / mean |d L_method / d pyramid|

    The means are running means over the measurements. A measurement takes two backward passes down to the pyramid, one
    through the detector's head and one through the method, not through the backbone.

    Args:
        ratio: wanted ratio of the norms; None scales nothing.
        every: steps from one measurement to the next; a method without an estimate is measured at once.
    """

    def __init__(self, ratio: float | None = None, every: int = 10):
        self.ratio, self.every = ratio, every
        self.estimates: dict[str, Estimate] = {}  # by the name of the method's part of a combination, or ""
        self._due = False
        self._measured: set[str] = set()
        self._mean: Callable[[Tensor], Tensor] = torch.clone

    def begin(self, step: int, mean: Callable[[Tensor], Tensor]) -> None:
        """Begins a step; its first micro-batch is measured if a measurement is due.

        Args:
            step: number of the step, from 0.
            mean: averages a CPU tensor over all processes.
        """
        self._due, self._measured, self._mean = step % self.every == 0, set(), mean

    def scaled(
        self, part: str, losses: dict[str, Tensor], detector: Mapping[str, Tensor], pyramid: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """A method's losses, those that reach the pyramid multiplied by the factor; measures it if due.

        Args:
            part: name of the method among several, or "".
            losses: weighted scalars of the method; not detached from the pyramid.
            detector: the detector's losses on the same pyramid.
            pyramid: L tensors [B, C, H_l, W_l], from which all these losses were computed.
        """
        if self.ratio is None:
            return losses
        if part not in self._measured and (self._due or part not in self.estimates):
            self._measured.add(part)
            self._measure(part, losses, detector, pyramid)
        factor = self.factor(part)
        reaching = self.estimates[part].losses if part in self.estimates else []
        return {name: factor * loss if name in reaching else loss for name, loss in losses.items()}

    def factor(self, part: str = "") -> float:
        """The factor on a method's losses; 1 before the first measurement with a gradient."""
        if self.ratio is None or part not in self.estimates:
            return 1.0
        estimate = self.estimates[part]
        return self.ratio * estimate.detector / estimate.method

    def _measure(
        self, part: str, losses: Mapping[str, Tensor], detector: Mapping[str, Tensor], pyramid: Sequence[Tensor]
    ) -> None:
        with torch.autocast(pyramid[0].device.type, enabled=False):  # as in the backward pass of a step
            by_loss = {name: _gradient(loss, pyramid) for name, loss in losses.items()}
            names = [name for name, gradient in by_loss.items() if any(level is not None for level in gradient)]
            whole = torch.stack([loss.float() for loss in detector.values()]).sum()
            squares = [_square(_gradient(whole, pyramid)), _square([_sum(levels) for levels in zip(*by_loss.values())])]
        # The mean of squares over processes: with two processes the ratio is that of one with all their images.
        of_detector, of_method = self._mean(torch.stack([square.cpu() for square in squares])).sqrt().tolist()
        if not (0 < of_detector < math.inf and 0 < of_method < math.inf):
            return  # no objects in the batch, or a step that the trainer ends with an error
        before = self.estimates.get(part)
        if before is None:
            now = Estimate(names, of_detector, of_method)
        else:
            now = Estimate(
                sorted({*before.losses, *names}),
                DECAY * before.detector + (1 - DECAY) * of_detector,
                DECAY * before.method + (1 - DECAY) * of_method,
            )
        self.estimates[part] = now
        now.measured = self.factor(part) * of_method / of_detector

    def report(self) -> dict[str, Any]:
        """The entry of a log record: factor and last measured ratio, by part if there are several; {} if off."""
        values = {p: {"factor": self.factor(p), "ratio": e.measured} for p, e in self.estimates.items()}
        return {"balance": values.get("", values)} if values else {}

    def state(self) -> dict[str, Any]:
        """The estimates as JSON types, without rounding."""
        return {part: asdict(estimate) for part, estimate in self.estimates.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state`."""
        self.estimates = {part: Estimate(**values) for part, values in state.items()}


def _gradient(loss: Tensor, pyramid: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradient of a scalar for each level; None where the level is not used."""
    if not loss.requires_grad:
        return [None] * len(pyramid)
    return torch.autograd.grad(loss, list(pyramid), retain_graph=True, allow_unused=True)


def _sum(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present).sum(0) if present else None


def _square(levels: Sequence[Tensor | None]) -> Tensor:
    """Sum of squares over all levels, float64."""
    norms = [torch.linalg.vector_norm(level, dtype=torch.float32) for level in levels if level is not None]
    return torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)
