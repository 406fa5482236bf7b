"""The doctor's check of what teaches the student: the boxes of the data, and the diagnostics of an earlier run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastkd.training.build import Built
from fastkd.training.config import Recipe
from fastkd.training.doctor.finding import Finding
from fastkd.training.doctor.median_box import median_box
from fastkd.training.run.logging import read_log


def check_boxes(built: Built) -> Iterator[Finding]:
    """The method's findings on the size of the training boxes."""
    data, method = built.recipe.data, built.recipe.method
    boxes, _, owner = built.train_set.objects()
    if method is None or not len(boxes):
        return
    short_sides = sorted(data.short_sides)
    sides = short_sides[len(short_sides) // 2], data.max_side
    detector = built.module.detector
    anchors = detector.imitation_anchors()
    yield from method.box_advice(median_box(boxes, built.train_set.sizes[owner], sides, anchors, detector.strides))


def check_teaching(recipe: Recipe, run_dir: Path) -> Iterator[Finding]:
    """The method's findings on what a run has logged so far.

    Args:
        recipe: of the run.
        run_dir: its directory; a run without log.jsonl gives no finding.
    """
    log = read_log(run_dir)
    if recipe.method is None or not log:
        return
    found = list(recipe.method.teaching_advice(log))
    yield from found
    if not found:
        text = f"{run_dir} has logged no diagnostics of {recipe.method.label}: it was not active, or has none"
        yield Finding("warning", "teaching", text)
