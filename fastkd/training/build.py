"""Builds data sets, student, method and teacher from a recipe, with every check that can be made before training."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd import assets
from fastkd.data import DetectionDataset, measure_priors, open_dataset
from fastkd.detectors import Detector, build_detector, check_teacher, inherit, load_backbone_weights, load_detector
from fastkd.detectors.backbones.base import Backbone
from fastkd.evaluation.coco import load_ground_truth
from fastkd.training.balance import Balance
from fastkd.training.config import Recipe
from fastkd.training.methods.protocol import Given
from fastkd.training.parallel.compiled import Regions
from fastkd.training.run.checkpoint import sha256_of
from fastkd.training.step import FrozenTeacher, StepModule
from fastkd.types import ClassPriors

log = logging.getLogger("fastkd.training")


@dataclass
class Built:
    """Everything a trainer trains with.

    Args:
        recipe: resolved against the data.
        train_set, val_set: the data.
        module: student, method and teacher.
        priors: class priors of the training set if the method needs them, else None.
        notes: the weights that were loaded and inherited, for metrics.json.
        teacher_sha256: SHA-256 of the teacher's file; None without a teacher.
    """

    recipe: Recipe
    train_set: DetectionDataset
    val_set: DetectionDataset
    module: StepModule
    priors: ClassPriors | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    teacher_sha256: str | None = None

    @property
    def data_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the training set, to check that a resumed run has the same."""
        data = self.train_set
        return {"images": len(data), "class_names": list(data.class_names), "sha256": data.fingerprint}


def open_data(recipe: Recipe) -> tuple[DetectionDataset, DetectionDataset]:
    """Training and validation set of a recipe.

    Raises: FileNotFoundError or ValueError if a file is missing or malformed, or the two disagree about the classes.
    """
    data, root = recipe.data, Path(recipe.data.root)
    options: dict[str, Any] = {"strict": data.strict, "crowd_boxes": data.crowd_boxes}
    train_set = open_dataset(
        data.format,
        root / data.train_annotations,
        root / data.train_images,
        with_masks=recipe.with_masks,
        **options,
    )
    val_set = open_dataset(
        data.format,
        root / data.val_annotations,
        root / data.val_images,
        with_masks=recipe.method is not None and recipe.method.needs_masks,
        **options,
    )
    if (train_set.class_names, train_set.category_ids) != (val_set.class_names, val_set.category_ids):
        raise ValueError(
            f"train: categories of {data.val_annotations} must be those of {data.train_annotations}, got "
            f"{val_set.class_names} against {train_set.class_names}; use files with one category table"
        )
    if not train_set.has_objects:
        raise ValueError(
            f"train: {data.train_annotations} must hold at least one object to learn from, got none in "
            f"{len(train_set)} images (left out: {train_set.skipped or 'nothing'}); check the file"
        )
    if data.format == "coco":
        # Load the evaluation's ground truth now, so that a bad file fails here and not after hours of training.
        images, file = val_set.image_ids.tolist(), Path(val_set.annotation_file)
        digest = val_set.annotation_sha256
        load_ground_truth(file, images, val_set.category_ids, masks=recipe.with_masks, sha256=digest)
    return train_set, val_set


def resolve(recipe: Recipe, train_set: DetectionDataset) -> Recipe:
    """The recipe with the number of classes of the data.

    Raises: ValueError if they differ and `data.match_classes` is False.
    """
    have, want = recipe.detector.num_classes, train_set.num_classes
    if have == want:
        return recipe
    if not recipe.data.match_classes:
        raise ValueError(
            f"train: detector.num_classes must be {want}, the categories of {train_set.annotation_file}, got {have}; "
            f"pass --detector.num-classes {want}"
        )
    log.info("detector.num_classes: %d instead of %d, from %s", want, have, train_set.annotation_file)
    return dataclasses.replace(recipe, detector=dataclasses.replace(recipe.detector, num_classes=want))


def _how_to_make(path: Path) -> str:
    """A hint with the command that makes `path` if it is the output of a named recipe; "" for other files."""
    from fastkd.training.recipes.named import recipe_names

    name = path.parent.name
    if path.parts[:-2] == ("runs",) and name in recipe_names():
        return f"make it with `fastkd train {name}` or "
    return ""


def _backbone(recipe: Recipe) -> str:
    """Describes the weights that fit a recipe's backbone, for messages."""
    name, width = recipe.detector.backbone, recipe.detector.width
    return f"{name} of width {width:g}" if width != 1 else f"torchvision's {name}"


def load_teacher(recipe: Recipe, student: Detector, class_names: list[str]) -> Detector:
    """The teacher of a recipe, checked against student and data.

    Raises: FileNotFoundError or ValueError if the file is missing or broken, or its classes or pyramid do not fit.
    """
    assert recipe.teacher is not None
    path = assets.resolve(recipe.teacher)
    if not path.is_file():
        raise FileNotFoundError(
            f"train: teacher must be a detector file, got {path}, which does not exist; "
            f"{_how_to_make(path)}pass --teacher PATH/student.safetensors"
        )
    teacher, teacher_names = load_detector(path)
    try:
        check_teacher(student, teacher)
    except ValueError as error:
        raise ValueError(f"train: teacher {path} does not fit this run: {error}") from error
    if recipe.inherit and teacher.config.kind != student.config.kind:
        raise ValueError(
            f"train: teacher must be a {student.config.kind} for its head to be inherited, got a "
            f"{teacher.config.kind} in {path}; train a {student.config.kind} teacher or pass --no-inherit"
        )
    if list(teacher_names) != list(class_names):
        raise ValueError(
            f"train: teacher's class names must be those of the data in the same order, got {list(teacher_names)} in "
            f"{path} against {list(class_names)}; train a teacher on this data"
        )
    return teacher


def teacher_digest(recipe: Recipe) -> str | None:
    """SHA-256 of the teacher's file; None without a teacher, or if there is no such file."""
    path = assets.resolve(recipe.teacher) if recipe.teacher is not None else None
    return sha256_of(path) if path is not None and path.is_file() else None


def build_distiller(recipe: Recipe, given: Given) -> nn.Module | None:
    """The distiller of a recipe with fresh weights from the global generator; an nn.ModuleDict for several methods."""
    return None if recipe.method is None else recipe.method.build(given)


def build(recipe: Recipe, data: tuple[DetectionDataset, DetectionDataset] | None = None) -> Built:
    """Builds everything a run needs. The student's initial weights depend on seed and detector, not on the method.

    Args:
        recipe: the recipe.
        data: `open_data(recipe)` if it was called before; reading large annotation files takes a minute.
    """
    train_set, val_set = open_data(recipe) if data is None else data
    recipe = resolve(recipe, train_set)
    notes: dict[str, Any] = {
        "data": {
            "train_images": len(train_set),
            "val_images": len(val_set),
            "train_skipped": train_set.skipped,
            "val_skipped": val_set.skipped,
        }
    }
    torch.manual_seed(recipe.seed)
    student = build_detector(recipe.detector)
    if recipe.runtime.recompute:
        backbone = student.parts()["backbone"]
        if not isinstance(backbone, Backbone):
            kind = recipe.detector.kind
            raise ValueError(
                f"train: runtime.recompute must be False for {kind}, got True; pass --runtime.no-recompute"
            )
        backbone.recompute()
    digest = teacher_digest(recipe)  # before and after reading: the file may be replaced in between
    teacher = load_teacher(recipe, student, train_set.class_names) if recipe.teacher is not None else None
    if teacher_digest(recipe) != digest:
        raise ValueError(f"train: teacher must not change while it is read, got another content in {recipe.teacher}")
    if recipe.backbone_weights is not None:
        weights = assets.resolve(recipe.backbone_weights)
        if not weights.is_file():
            remedy = _how_to_make(weights) or f"put weights of {_backbone(recipe)} there or "
            raise FileNotFoundError(
                f"train: backbone_weights must be a file, got {weights}, which does not exist; "
                f"{remedy}pass --backbone-weights PATH"
            )
        notes["backbone_weights"] = str(load_backbone_weights(student, weights))
    if recipe.inherit:
        assert teacher is not None  # a recipe that inherits names one
        notes["inherited"] = str(inherit(student, teacher))
    for name in ("backbone_weights", "inherited"):
        if name in notes:
            log.info("%s: %s", name, notes[name])
    method = recipe.method
    priors = measure_priors(train_set) if method is not None and method.needs_priors else None
    torch.manual_seed(recipe.seed + 1)
    distiller = build_distiller(recipe, Given(student, teacher, priors, recipe.runtime.recompute))
    dtype = torch.bfloat16 if recipe.runtime.precision == "bfloat16" else None
    needed = method is not None and method.needs_teacher
    frozen = FrozenTeacher(teacher, dtype) if teacher is not None and needed else None
    ratio, every = recipe.distill.balance, recipe.distill.balance_every
    module = StepModule(student, distiller, frozen, dtype, Regions(recipe.runtime.compile), Balance(ratio, every))
    return Built(recipe, train_set, val_set, module, priors, notes, digest)
