"""Trains each method's Scenes recipe for the remaining minutes, on images drawn in memory.

Recorded: the losses per step, the detector's loss on held-out images, and steps per second. The students are saved
beside the JSON, for evaluation on a machine with pycocotools (`fastkd evaluate`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.stages import Context
from fastkd import assets
from fastkd.data.generated import draw_all
from fastkd.data.scenes import SCENE_CLASSES
from fastkd.data.scenes_render import SceneStyle, render_scene
from fastkd.data.transforms import normalise
from fastkd.detectors import build_detector, inherit, load_backbone_weights, save_detector
from fastkd.training.build import build_distiller, load_teacher
from fastkd.training.config import Recipe
from fastkd.training.methods.protocol import Given
from fastkd.training.optimizers import build_optimizers
from fastkd.training.parallel.compiled import Regions
from fastkd.training.recipes.named import get_recipe
from fastkd.training.schedule import phase_at
from fastkd.training.step import FrozenTeacher, StepModule, sum_losses
from fastkd.types import Batch, ClassPriors

STYLE = SceneStyle(sizes=((128, 128),))
METHODS = ("baseline", "lgd", "icd", "fgfi")


@dataclass
class Picture:
    """Pixels [3, 128, 128] float32, normalised, and the objects of an image."""

    image: np.ndarray
    boxes: np.ndarray  # [n, 4] float32 xyxy
    labels: list[int]


def draw(seed: int) -> Picture:
    """The picture of a seed."""
    picture, labels, masks = render_scene(np.random.default_rng(seed), STYLE)
    pixels = np.zeros((*picture.shape[:2], 3), np.float32)
    normalise(picture, pixels)
    boxes = np.zeros((len(labels), 4), np.float32)
    for row, mask in enumerate(masks):
        y, x = np.nonzero(mask)
        boxes[row] = x.min(), y.min(), x.max() + 1, y.max() + 1
    return Picture(pixels.transpose(2, 0, 1), boxes, labels)


def batch_of(pictures: list[Picture], seeds: list[int]) -> Batch:
    """A batch of pictures of one size."""
    counts = [len(picture.labels) for picture in pictures]
    height, width = pictures[0].image.shape[1:]
    return Batch(
        images=torch.from_numpy(np.stack([picture.image for picture in pictures])),
        image_sizes=torch.tensor([[height, width]] * len(pictures)),
        boxes=torch.from_numpy(np.concatenate([picture.boxes for picture in pictures])),
        labels=torch.tensor([label for picture in pictures for label in picture.labels], dtype=torch.int64),
        image_index=torch.arange(len(pictures)).repeat_interleave(torch.tensor(counts)),
        counts=counts,
        seeds=seeds,
    )


def batches(pictures: list[Picture], size: int, seed: int = 0) -> Iterator[Batch]:
    """Infinite iterator of random batches."""
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(len(pictures), size=size)
        yield batch_of([pictures[row] for row in rows], [int(value) for value in rng.integers(2**31, size=size)])


def priors_of(pictures: list[Picture]) -> ClassPriors:
    """Frequencies and sizes of the classes."""
    labels = np.concatenate([picture.labels for picture in pictures]).astype(np.int64)
    boxes = np.concatenate([picture.boxes for picture in pictures]).astype(np.float64)
    sides = (boxes[:, 2:] - boxes[:, :2]) / pictures[0].image.shape[1]
    count = np.bincount(labels, minlength=len(SCENE_CLASSES))
    mean, std = np.zeros((2, len(SCENE_CLASSES), 2))
    for label in np.flatnonzero(count):
        mean[label], std[label] = sides[labels == label].mean(0), sides[labels == label].std(0)
    return ClassPriors(torch.from_numpy(count / count.sum()), torch.from_numpy(mean), torch.from_numpy(std))


def module_of(recipe: Recipe, priors: ClassPriors, device: torch.device) -> StepModule:
    """Student, method and teacher of a recipe, with the weights shipped with fastkd."""
    torch.manual_seed(recipe.seed)
    student = build_detector(recipe.detector)
    load_backbone_weights(student, assets.resolve(recipe.backbone_weights))
    teacher = load_teacher(recipe, student, list(SCENE_CLASSES)) if recipe.teacher is not None else None
    if recipe.inherit:
        inherit(student, teacher)
    distiller = build_distiller(recipe, Given(student, teacher, priors, recipe.runtime.recompute))
    needed = recipe.method is not None and recipe.method.needs_teacher
    frozen = FrozenTeacher(teacher, torch.bfloat16) if needed else None
    module = StepModule(student, distiller, frozen, torch.bfloat16, Regions(False))
    module = module.to(device=device, memory_format=torch.channels_last)
    if module.teacher is not None:
        module.teacher.to(device, torch.channels_last)
    return module


def held_out_loss(module: StepModule, pictures: list[Picture], device: torch.device) -> float:
    """The detector's loss in training mode without gradient; norms of Scenes students are frozen."""
    total = 0.0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for first in range(0, len(pictures), 16):
            part = pictures[first : first + 16]
            batch = batch_of(part, list(range(len(part)))).to(device, memory_format=torch.channels_last)
            losses = module.detector.loss(module.detector.features(batch.images), batch)
            total += float(sum_losses(losses)) * len(part)
    return total / len(pictures)


def train(
    recipe: Recipe, pictures: list[Picture], kept: list[Picture], device: torch.device, seconds: float, out: Path | None
) -> dict[str, Any]:
    """Train the recipe's steps, or as many as fit in `seconds`; the schedule is then cut off."""
    module = module_of(recipe, priors_of(pictures), device)
    trainable = frozenset(name for name, p in module.named_parameters() if p.requires_grad)
    optimizers = build_optimizers(recipe, module)
    before = held_out_loss(module, kept, device)
    steps, curve, phase = recipe.schedule.steps, [], None
    begin = time.monotonic()
    for step, batch in zip(range(steps), batches(pictures, recipe.schedule.batch_size)):
        if phase_at(recipe, step) != phase:
            phase = phase_at(recipe, step)
            module.apply_phase(phase, trainable)
        for optimizer in optimizers:
            optimizer.set_rate(step, steps)
        losses = module(batch.to(device, non_blocking=True, memory_format=torch.channels_last), phase)
        sum_losses(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            curve.append({"step": step, **{name: float(value.detach()) for name, value in losses.items()}})
        if time.monotonic() - begin > seconds:
            break
    done, taken = step + 1, time.monotonic() - begin
    if out is not None:
        save_detector(module.detector, out / f"{recipe.name}.safetensors", list(SCENE_CLASSES))
    return {
        "steps": done,
        "of": steps,
        "seconds": taken,
        "steps_per_s": done / taken,
        "held_out_loss": [before, held_out_loss(module, kept, device)],
        "curve": curve,
    }


def scenes(context: Context) -> None:
    """The stage: equal time for each method."""
    count, kept = (16, 4) if context.toy else (2000, 100)
    ((_, drawn),) = draw_all(draw, {"all": list(range(count + kept))}, 1 if context.toy else 16, None)
    context.record("pictures", {"train": count, "held_out": kept, "seconds": context.seconds - 5 - context.left})
    out = context.file.parent if context.file is not None else None
    methods = METHODS[1:3] if context.toy else METHODS
    for number, method in enumerate(methods):
        recipe = get_recipe(f"scenes-retinanet-{method}")
        share = 0.0 if context.toy else max(0.0, (context.left - 3) / (len(methods) - number) - 2)
        context.attempt(
            method,
            lambda r=recipe, s=share: train(r, drawn[:count], drawn[count:], torch.device(context.device), s, out),
        )
