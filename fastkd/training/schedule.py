"""Learning rate, phase and logging of every step: functions of recipe and step alone, so resuming needs no state."""

from __future__ import annotations

import math

from fastkd.training.config import Recipe
from fastkd.training.methods.phase import Phase, steps_of
from fastkd.training.optimizer_config import OptimizerConfig


def phase_at(recipe: Recipe, step: int) -> Phase:
    """The phase of step `step` (from 0).

    Only a pretrained backbone is frozen (methods 2.5): with `backbone_weights` None nothing is frozen.
    """
    if recipe.method is None:
        return Phase(distill=False)
    return recipe.method.phase(step, recipe.schedule.steps, pretrained=recipe.backbone_weights is not None)


def is_logged(recipe: Recipe, step: int) -> bool:
    """Whether log.jsonl gets a line after `step` finished steps."""
    return step == recipe.schedule.steps or step % recipe.runtime.log_every == 0


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's global generator for a step: seeded anew in each step, so checkpoints need no generator state."""
    return ((seed * 1_000_003 + step) * 4099 + rank) % 2**63


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of a run of `steps`.

    rate = learning_rate * warmup * decay. warmup rises linearly from warmup_factor to 1; decay is
    gamma ** (milestones reached) or (1 + cos(pi * step / steps)) / 2.
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
