"""Learning rate and phase of every step: pure functions of the recipe and the step, so resuming needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastkd.training.config import FGFIConfig, ICDConfig, LGDConfig, LGDICDConfig, OptimizerConfig, Recipe


@dataclass(frozen=True)
class Phase:
    """What is switched on in a step.

    Args:
        distill: run the method; without it the step is the detector's alone and the method gets no update.
        detach_student: keep the distillation loss from the student's features (the method still learns).
        train_backbone: update the backbone below the FPN.
        parts: the phases of LGD and of ICD where both run; None means this one for each.
    """

    distill: bool = True
    detach_student: bool = False
    train_backbone: bool = True
    parts: tuple[Phase, Phase] | None = None

    def of(self, part: str) -> Phase:
        """The phase of "lgd" or "icd" where both run."""
        return self if self.parts is None else self.parts[("lgd", "icd").index(part)]


def steps_of(fraction: float, steps: int) -> int:
    """Number of steps that a fraction of the run stands for, rounded to the nearest."""
    return math.floor(fraction * steps + 0.5)


def phase_at(recipe: Recipe, step: int) -> Phase:
    """The phase of step `step` (from 0).

    Freezing applies only to a pretrained backbone (methods 2.5): with `backbone_weights` None nothing is frozen.
    """
    method = recipe.method
    if method is None:
        return Phase(distill=False)
    if isinstance(method, LGDICDConfig):
        lgd, icd = (_phase_of(part, recipe, step) for part in (method.lgd, method.icd))
        both = lgd.detach_student and icd.detach_student
        return Phase(lgd.distill or icd.distill, both, lgd.train_backbone, (lgd, icd))
    return _phase_of(method, recipe, step)


def _phase_of(method: LGDConfig | ICDConfig | FGFIConfig, recipe: Recipe, step: int) -> Phase:
    steps = recipe.schedule.steps
    last = step >= steps - steps_of(method.final_fraction, steps)
    if isinstance(method, FGFIConfig):
        return Phase(distill=not last and step >= steps_of(method.warmup_fraction, steps))
    detach = step < steps_of(method.detach_fraction, steps)
    if isinstance(method, ICDConfig):
        return Phase(distill=not last, detach_student=detach and not last)
    assert isinstance(method, LGDConfig)
    frozen = recipe.backbone_weights is not None and step < steps_of(method.freeze_fraction, steps)
    return Phase(distill=not last, detach_student=detach and not last, train_backbone=not frozen)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of a run of `steps`.

    rate = learning_rate * warm-up * decay; warm-up rises linearly from warmup_factor to 1; decay is gamma to the number
    of milestones reached, or (1 + cos(pi * step / steps)) / 2.
    """
    warmup_steps = steps_of(config.warmup, steps)
    factor = 1.0
    if step < warmup_steps:
        factor = config.warmup_factor + (1.0 - config.warmup_factor) * step / warmup_steps
    if config.decay == "cosine":
        factor *= 0.5 * (1.0 + math.cos(math.pi * step / steps))
    else:
        factor *= config.gamma ** sum(step >= steps_of(milestone, steps) for milestone in config.milestones)
    return config.learning_rate * factor
