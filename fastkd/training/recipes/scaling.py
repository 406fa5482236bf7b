"""Scales a recipe to another batch size."""

from __future__ import annotations

import dataclasses

from fastkd.training.config import Recipe


def scale_to_batch(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe with another batch size, by the linear scaling rule.

    Learning rates (including the methods') are multiplied by batch_size / old, steps by old / batch_size. The total
    number of images stays the same; warm-up, milestones and phases are fractions of the run, so they begin after the
    same number of images as before.

    Args:
        recipe: written for batches of `recipe.schedule.batch_size` images.
        batch_size: the new batch size, a multiple of `recipe.schedule.accumulate`.
    Raises: ValueError if batch_size is below 1 or not such a multiple.
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
