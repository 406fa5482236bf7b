"""Other batch sizes than the one a recipe was written for."""

from __future__ import annotations

import dataclasses

from fastkd.training.config import Recipe


def scale_to_batch(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe for another number of images a step, by the linear rule.

    Learning rates (the methods' own, too) are multiplied by batch_size / old, steps by old / batch_size: as many
    images are seen, and warm-up, milestones and phases, being fractions of the run, come after as many images.

    Args:
        recipe: for `recipe.schedule.batch_size` images a step.
        batch_size: images of a step, a multiple of `recipe.schedule.accumulate`.
    Raises: ValueError if batch_size is below 1 or no such multiple.
    Source: Accurate, Large Minibatch SGD (Goyal et al., 2017).
    """
    if batch_size < 1:
        raise ValueError(f"scale_to_batch: batch_size must be at least 1, got {batch_size}")
    schedule = recipe.schedule
    factor = batch_size / schedule.batch_size
    steps = max(1, round(schedule.steps / factor))
    return dataclasses.replace(
        recipe,
        schedule=dataclasses.replace(schedule, steps=steps, batch_size=batch_size),
        method=recipe.method and recipe.method.scaled(factor),
        optimizer=recipe.optimizer.scaled(factor),
        method_optimizer=recipe.method_optimizer and recipe.method_optimizer.scaled(factor),
    )
