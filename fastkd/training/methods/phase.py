"""Phases of distillation: method, gradients and backbone updates of a training step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Switches of a training step.

    Args:
        distill: run the method; if False only the detector is trained.
        detach_student: stop the gradient of the distillation loss to the student (the method is still trained).
        train_backbone: update the backbone below the FPN.
        parts: the phase of each of several methods on one student, by name; empty uses this phase for all.
    """

    distill: bool = True
    detach_student: bool = False
    train_backbone: bool = True
    parts: tuple[tuple[str, Phase], ...] = ()

    def of(self, part: str) -> Phase:
        """The phase of one of several methods, by name."""
        return dict(self.parts).get(part, self)


def steps_of(fraction: float, steps: int) -> int:
    """Number of steps in a fraction of the run, rounded to the nearest."""
    return math.floor(fraction * steps + 0.5)
