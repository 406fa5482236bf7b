"""The data loader of a run, and statistics of the time that training waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastkd.data import BatchLoader, build_train_loader
from fastkd.training.build import Built
from fastkd.training.parallel.processes import Processes


def train_loader(built: Built, group: Processes, step: int = 0, parts: int | None = None) -> BatchLoader:
    """This process's share of the micro-batches of all steps after `step`.

    Args:
        built: data and recipe.
        group: the processes that share each batch.
        step: finished optimiser steps.
        parts: number of micro-batches of the run, counted from its first step; None takes all.
    """
    recipe, data, schedule = built.recipe, built.recipe.data, built.recipe.schedule
    return build_train_loader(
        built.train_set,
        batch_size=schedule.batch_size // schedule.accumulate,
        total_steps=schedule.steps * schedule.accumulate if parts is None else parts,
        seed=recipe.seed,
        start_step=step * schedule.accumulate,
        world_size=group.world_size,
        rank=group.rank,
        workers=data.workers,
        prefetch=data.prefetch,
        short_sides=data.short_sides,
        max_side=data.max_side,
        flip=0.5 if data.flip else 0.0,
        divisor=data.divisor,
        aspect_grouping=data.aspect_grouping,
        channels_last=recipe.runtime.channels_last,
        pin_memory=group.device.type == "cuda",
    )


@dataclass
class Loading:
    """Loading statistics, summed over the log intervals since the run was last started.

    Args:
        images: number of training images.
        steps: number of steps.
        seconds: total time of these steps.
        waited: part of `seconds` spent waiting for data.
        made: seconds that the loaders of all processes need for these images at their measured rate.
    """

    images: int = 0
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    made: float = 0.0

    def add(self, images: int, steps: int, seconds: float, waited: float, rate: float) -> dict[str, float]:
        """Adds an interval.

        Args:
            images, steps: counts of the interval, over all processes.
            seconds, waited: times of the process that waited longest.
            rate: images per second of all loaders together.
        Returns: the entries of the log record.
        """
        self.images, self.steps = self.images + images, self.steps + steps
        self.seconds, self.waited, self.made = self.seconds + seconds, self.waited + waited, self.made + images / rate
        return {
            "images_per_second": images / seconds,
            "seconds_per_step": seconds / steps,
            "data_seconds": waited / steps,
            "data_wait": waited / seconds,
            "loader_images_per_second": rate,
        }

    def summary(self) -> dict[str, Any] | None:
        """The same entries over all intervals, for metrics.json; None if no step was taken."""
        if not self.steps:
            return None
        return Loading().add(self.images, self.steps, self.seconds, self.waited, self.images / self.made)
