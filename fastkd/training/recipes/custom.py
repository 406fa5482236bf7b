"""Recipes for one's own, small data set: custom-<detector>-<method>, with settings chosen from the annotations.

`choose` is the whole rule. It changes a scenes recipe: the same small networks, which train on a CPU and whose backbone
weights ship with fastkd.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastkd.data.facts import DataFacts
from fastkd.detectors.config import WITHOUT_ANCHORS
from fastkd.training.config import DataConfig, Recipe

DATA = DataConfig(root="data/custom")
# A set of which `choose` makes the scenes recipe's sides, anchors and rates: shown where no data set is given.
NOMINAL = DataFacts(
    images=100,
    objects=300,
    classes=10,
    most_objects=9,
    small_box=16.0,
    median_box=31.0,
    ratios=(0.86, 1.0, 1.18),
    short_side=96.0,
    elongation=1.67,
)
LOCATED = ("root", "train_annotations", "train_images", "format", "crowd_boxes")  # options that locate the training set


@dataclass(frozen=True)
class Chosen:
    """Settings chosen from a data set.

    Args:
        side, max_side: short side and longest side of the resized images, pixels.
        scale: resized / original lengths of an image of median size.
        anchor_base, anchor_ratios: see DetectorConfig; no ratios for detectors without anchors.
        detections: maximum number of detections of one image.
        steps, batch_size: length of the run and images of a step.
        rate, clip_norm, warmup: of AdamW.
    """

    side: int
    max_side: int
    scale: float
    anchor_base: float
    anchor_ratios: tuple[float, ...] | None
    detections: int
    steps: int
    batch_size: int
    rate: float
    clip_norm: float
    warmup: float


def choose(facts: DataFacts, detector: str) -> Chosen:
    """The settings for a data set and a kind of detector ("retinanet", ...)."""
    # Sides: the median box covers 4 cells of stride 8 and the small ones cover 2, as in the scenes recipes. Enlarging
    # images more than twice adds cost and no information; beyond 512 pixels, tiles are cheaper (`fastkd data tile`).
    scale = min(2.0, max(32 / facts.median_box, 16 / facts.small_box))
    side = min(512, max(128, _multiple_of_32(scale * facts.short_side)))
    max_side = _multiple_of_32(side * min(facts.elongation, 2.0))
    scale = side / facts.short_side

    # Anchors: the small boxes have a side of 7/8 of the anchor at stride 8, so that most boxes lie on the two finest
    # levels. The scenes recipes' 3 and the 5 found for larger objects (findings.md) follow this rule.
    base = min(8.0, max(1.5, round(2 * facts.small_box * scale / 7) / 2))
    ratios = None if detector in WITHOUT_ANCHORS else _ratios(facts.ratios)

    # Length: COCO's 90,000 steps of 16 images for 118,000 images, times (images / 118,000)^(2/3): a set with an eighth
    # of the images gets a quarter of the steps, so it is seen twice as often.
    steps = max(500, round(90_000 * (facts.images / 118_000) ** (2 / 3), -2))

    # Batch and rate: large images are half as many, and AdamW's rate follows the root of the batch. The two rates,
    # clipping and warm-up are those of the stable recipes (findings.md): short runs bear the higher rate.
    batch_size = 16 if side <= 256 else 8
    rate = (1.5e-3 if steps <= 1000 else 7e-4) * math.sqrt(batch_size / 16)
    warmup = min(0.1, max(0.05, 100 / steps))

    detections = min(500, max(100, math.ceil(1.5 * facts.most_objects)))
    return Chosen(
        side=side,
        max_side=max_side,
        scale=scale,
        anchor_base=base,
        anchor_ratios=ratios,
        detections=detections,
        steps=int(steps),
        batch_size=batch_size,
        rate=float(f"{rate:.2g}"),
        clip_norm=2.0,
        warmup=warmup,
    )


def _multiple_of_32(length: float) -> int:
    return 32 * math.ceil(round(length / 32, 6))


def _ratios(quantiles: tuple[float, float, float]) -> tuple[float, ...]:
    """Squares if most boxes are nearly square; else the quantiles that differ by a quarter or more."""
    if quantiles[0] >= 1 / 1.5 and quantiles[2] <= 1.5:
        return (1.0,)
    found: list[float] = []
    for ratio in quantiles:
        if not found or ratio >= 1.25 * found[-1]:
            found.append(float(f"{ratio:.2g}"))
    return tuple(found)


def fit(recipe: Recipe, facts: DataFacts, data: DataConfig) -> Recipe:
    """The recipe custom-<detector>-<method>: a scenes recipe with the settings chosen for a data set.

    Args:
        recipe: scenes-<detector>-<method>; networks, method and its optimiser stay.
        facts: of the training set.
        data: paths of the data set.
    """
    name = "custom" + recipe.name.removeprefix("scenes")
    teacher = name.rsplit("-", 1)[0] + "-teacher"
    chosen = choose(facts, recipe.detector.detector)
    detector = dataclasses.replace(
        recipe.detector,
        num_classes=facts.classes,
        anchor_base=chosen.anchor_base,
        anchor_ratios=chosen.anchor_ratios,
        detections_per_image=chosen.detections,
    )
    weights = "asset:scenes-retinanet-teacher.safetensors" if name == teacher else recipe.backbone_weights
    return dataclasses.replace(
        recipe,
        name=name,
        detector=detector,
        data=dataclasses.replace(
            data, short_sides=(chosen.side,), val_short_side=chosen.side, max_side=chosen.max_side
        ),
        teacher=f"runs/{teacher}/student.safetensors" if recipe.teacher else None,
        backbone_weights=weights,
        optimizer=dataclasses.replace(
            recipe.optimizer, learning_rate=chosen.rate, clip_norm=chosen.clip_norm, warmup=chosen.warmup
        ),
        schedule=dataclasses.replace(recipe.schedule, steps=chosen.steps, batch_size=chosen.batch_size),
    )


def summary(facts: DataFacts, detector: str) -> str:
    """What was measured and chosen, in one line, with advice to tile images whose objects stay too small."""
    chosen = choose(facts, detector)
    small, median = chosen.scale * facts.small_box, chosen.scale * facts.median_box
    ratios = "" if chosen.anchor_ratios is None else f", ratios {', '.join(f'{r:g}' for r in chosen.anchor_ratios)}"
    text = (
        f"{facts.images:,} images of {facts.short_side:.0f} px with {facts.objects:,} objects of {facts.classes} "
        f"classes, median box {facts.median_box:.0f} px, small ones {facts.small_box:.0f} px: {chosen.steps:,} steps of"
        f" {chosen.batch_size} images, side {chosen.side} (median box {median:.0f} px), anchor base "
        f"{chosen.anchor_base:g}{ratios}, rate {chosen.rate:g}, clip {chosen.clip_norm:g}, warm-up {chosen.warmup:.0%}"
    )
    if small < 8:
        text += f"; small boxes are {small:.0f} px at that side, less than a cell: cut tiles with `fastkd data tile`"
    return text


def data_options(args: Sequence[str], default: DataConfig = DATA) -> DataConfig:
    """The data set named by command-line arguments, of which others are ignored."""
    parser = argparse.ArgumentParser(prog="fastkd train", add_help=False, allow_abbrev=False)
    for name in LOCATED:
        parser.add_argument(f"--data.{name.replace('_', '-')}", dest=name, default=getattr(default, name))
    dashed = [arg.replace("_", "-") if arg.startswith("--data.") and "=" not in arg else arg for arg in args]
    known, _ = parser.parse_known_args(dashed)
    return dataclasses.replace(default, **vars(known))
