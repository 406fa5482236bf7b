"""The training data of a run: its loader, and whether training waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastkd.data import BatchLoader, build_train_loader
from fastkd.training.build import Built
from fastkd.training.parallel.processes import Processes


def train_loader(built: Built, group: Processes, step: int = 0, parts: int | None = None) -> BatchLoader:
    """The parts of the steps after `step`, this process's share of each.

    Args:
        built: data and recipe.
        group: the processes the batches are divided over.
        step: finished optimiser steps.
        parts: of the run, counted from its first step; None takes those of all its steps.
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
    """Sums over the log intervals since the run was last started: steps, and what they waited for data.

    Args:
        images: trained on.
        steps: taken.
        seconds: they took in all.
        waited: of these, waiting for data.
        made: seconds all processes' loaders would need for the images at their own rate.
    """

    images: int = 0
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    made: float = 0.0

    def add(self, images: int, steps: int, seconds: float, waited: float, rate: float) -> dict[str, float]:
        """Adds an interval.

        Args:
            images, steps: of all processes.
            seconds, waited: of the process that waited longest.
            rate: images a second of all loaders.
        Returns: what its log record says of it.
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
        """The same of all intervals, for metrics.json; None where no step was taken."""
        if not self.steps:
            return None
        return Loading().add(self.images, self.steps, self.seconds, self.waited, self.images / self.made)
