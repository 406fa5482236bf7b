"""What is switched on in a step of training."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """What is switched on in a step.

    Args:
        distill: run the method; without it the step is the detector's alone and the method gets no update.
        detach_student: keep the distillation loss from the student's features (the method still learns).
        train_backbone: update the backbone below the FPN.
        parts: the phases of several methods on one student, by name; empty means this one for each.
    """

    distill: bool = True
    detach_student: bool = False
    train_backbone: bool = True
    parts: tuple[tuple[str, Phase], ...] = ()

    def of(self, part: str) -> Phase:
        """The phase of one of several methods."""
        return dict(self.parts).get(part, self)


def steps_of(fraction: float, steps: int) -> int:
    """Number of steps that a fraction of the run stands for, rounded to the nearest."""
    return math.floor(fraction * steps + 0.5)
