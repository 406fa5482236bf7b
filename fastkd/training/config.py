"""Configuration of a training run: frozen dataclasses, validated on construction, convertible to and from JSON.

Every duration except `Schedule.steps` is a fraction of the run: `--schedule.steps 100` also rescales the warm-up, the
learning rate milestones and the distillation phases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fastkd.codec import decode, encode, require
from fastkd.detectors import DetectorConfig
from fastkd.training.methods import Method, kinds
from fastkd.training.optimizer_config import OptimizerConfig


@dataclass(frozen=True)
class DataConfig:
    """Paths of images and annotations, and the preprocessing of images.

    Args:
        root: folder of the data set; the four paths below are relative to it (absolute ones are taken as they are).
        train_annotations: annotation file to train on.
        train_images: folder of its images.
        val_annotations: annotation file to evaluate on.
        val_images: folder of its images.
        format: format of the annotation files: "coco" (JSON) or "crowdhuman" (odgt, evaluated by AP, MR^-2 and JI).
        crowd_boxes: boxes used as objects in the crowdhuman format: "full", "visible" or "head".
        short_sides: lengths of the short side, pixels; each training image draws one.
        val_short_side: length of the short side in evaluation, pixels.
        max_side: longest side after resizing, pixels.
        flip: flip half of the training images horizontally.
        divisor: batches are padded to a multiple of this, pixels.
        aspect_grouping: batch images of similar aspect ratio together (less padding).
        match_classes: take the number of classes from the training annotations; if False, a mismatch is an error.
        strict: raise on a bad box or image instead of skipping and counting it.
        val_batch_size: images of one evaluation batch of one process.
        workers: loader processes of each rank; affects speed, never the batches.
        prefetch: batches that each worker loads ahead.
    """

    root: str = "data/scenes"
    train_annotations: str = "annotations/train.json"
    train_images: str = "train"
    val_annotations: str = "annotations/val.json"
    val_images: str = "val"
    format: Literal["coco", "crowdhuman"] = "coco"
    crowd_boxes: Literal["full", "visible", "head"] = "full"
    short_sides: tuple[int, ...] = (128,)
    val_short_side: int = 128
    max_side: int = 256
    flip: bool = True
    divisor: int = 32
    aspect_grouping: bool = True
    match_classes: bool = True
    strict: bool = False
    val_batch_size: int = 16
    workers: int = 1
    prefetch: int = 2

    def __post_init__(self) -> None:
        require(self.format in ("coco", "crowdhuman"), "DataConfig: format", "'coco' or 'crowdhuman'", self.format)
        known = self.crowd_boxes in ("full", "visible", "head")
        require(known, "DataConfig: crowd_boxes", "'full', 'visible' or 'head'", self.crowd_boxes)
        require(len(self.short_sides) > 0, "DataConfig: short_sides", "one or more lengths", self.short_sides)
        for side in (*self.short_sides, self.val_short_side):
            require(1 <= side <= self.max_side, "DataConfig: short_sides", f"in [1, max_side = {self.max_side}]", side)
        require(self.divisor >= 1, "DataConfig: divisor", "at least 1", self.divisor)
        require(self.val_batch_size >= 1, "DataConfig: val_batch_size", "at least 1", self.val_batch_size)
        require(self.workers >= 0, "DataConfig: workers", "0 or more", self.workers)
        require(self.prefetch >= 1, "DataConfig: prefetch", "at least 1", self.prefetch)


@dataclass(frozen=True)
class Schedule:
    """Number of steps and batch size.

    Args:
        steps: optimiser steps.
        batch_size: images of one step, over all processes and accumulated micro-batches.
        accumulate: micro-batches of a step (gradient accumulation, saves memory).
    """

    steps: int = 600
    batch_size: int = 16
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            require(getattr(self, name) >= 1, f"Schedule: {name}", "at least 1", getattr(self, name))
        require(
            self.batch_size % self.accumulate == 0,
            "Schedule: batch_size",
            f"a multiple of accumulate = {self.accumulate}",
            self.batch_size,
        )


@dataclass(frozen=True)
class DistillConfig:
    """Settings of distillation that are common to all methods.

    Args:
        balance: scale the losses of the method so that their gradient at the pyramid has this ratio to the gradient of
            the detector's loss (methods.md 10); None takes the method's weight as it is.
        balance_every: steps from one measurement of the two gradients to the next.
    """

    balance: float | None = None
    balance_every: int = 10

    def __post_init__(self) -> None:
        ratio = self.balance
        good = ratio is None or (math.isfinite(ratio) and ratio > 0)
        require(good, "DistillConfig: balance", "positive and finite, or None", ratio, "0.1 to 1 are usual")
        require(self.balance_every >= 1, "DistillConfig: balance_every", "at least 1", self.balance_every)


@dataclass(frozen=True)
class RuntimeConfig:
    """Execution of the run. Only `precision`, `channels_last`, `compile`, `ops`, `deterministic` and
    `grad_compression` can change its results.

    Args:
        precision: "bfloat16" runs under autocast, "float32" does not.
        channels_last: images and weights in channels-last memory order.
        compile: run features, head, method and frozen teacher through torch.compile (needs a C++ compiler, on a GPU
            Triton): fewer, larger kernels after some minutes of compilation. Results differ from eager mode by
            rounding only; with images of several sizes a resumed run equals an uninterrupted one up to rounding.
        deterministic: ask torch for deterministic kernels on the GPU, so that resuming there is bit-exact too.
        recompute: activation checkpointing of the backbone's blocks and of LGD's branches: less memory, more time, the
            same results. Only for ResNets without batch statistics.
        ops: "compiled" uses compiled kernels where they exist; "reference" uses plain torch for every op, to compare a
            run with the specification.
        grad_compression: dtype of the gradients in the all-reduce: "bf16" or "fp16" halves the bytes, "none" keeps
            float32. fp16 overflows beyond 65504.
        timeout: minutes a process waits for the others before the run ends with an error.
        log_every: steps between two lines of log.jsonl.
        checkpoint_every: steps between two checkpoints.
        keep_last: checkpoints kept.
        eval_every: steps between two evaluations; 0 evaluates at the end only.
        ledger_pairs: pairs of steps timed for the cost ledger, student alone and with the method; 0 writes no ledger.
            Fewer than 6 give no confidence interval.
    """

    precision: Literal["float32", "bfloat16"] = "bfloat16"
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False
    recompute: bool = False
    ops: Literal["compiled", "reference"] = "compiled"
    grad_compression: Literal["none", "bf16", "fp16"] = "none"
    timeout: float = 30.0
    log_every: int = 20
    checkpoint_every: int = 200
    keep_last: int = 2
    eval_every: int = 0
    ledger_pairs: int = 12

    def __post_init__(self) -> None:
        known = self.precision in ("float32", "bfloat16")
        require(known, "RuntimeConfig: precision", "'float32' or 'bfloat16'", self.precision)
        require(self.ops in ("compiled", "reference"), "RuntimeConfig: ops", "'compiled' or 'reference'", self.ops)
        known = self.grad_compression in ("none", "bf16", "fp16")
        require(known, "RuntimeConfig: grad_compression", "'none', 'bf16' or 'fp16'", self.grad_compression)
        require(self.timeout > 0, "RuntimeConfig: timeout", "a positive number of minutes", self.timeout)
        for name in ("log_every", "checkpoint_every", "keep_last"):
            require(getattr(self, name) >= 1, f"RuntimeConfig: {name}", "at least 1", getattr(self, name))
        for name in ("eval_every", "ledger_pairs"):
            require(getattr(self, name) >= 0, f"RuntimeConfig: {name}", "0 or more", getattr(self, name))


@dataclass(frozen=True)
class Recipe:
    """The complete configuration of a run.

    Args:
        name: name of the recipe; also the default name of the run directory.
        detector: the student.
        data: images, annotations and augmentation.
        method: distillation method; None trains the detector alone.
        distill: settings common to all methods.
        teacher: file of a trained detector (a run's student.safetensors), for methods that need one and for inheriting;
            "asset:NAME" is one that ships with fastkd.
        inherit: initialise neck and head from the teacher where names and shapes agree.
        backbone_weights: file of pretrained weights (torchvision names) or "asset:NAME"; None means random weights.
        optimizer: optimiser of the student, and of the method if `method_optimizer` is None.
        method_optimizer: optimiser of the method's own parameters.
        schedule: steps and batch size.
        runtime: precision, logging, checkpoints.
        seed: seed of initial weights, data order and all random numbers of training.
    """

    name: str
    detector: DetectorConfig
    data: DataConfig = field(default_factory=DataConfig)
    method: Method | None = None
    teacher: str | None = None
    inherit: bool = False
    backbone_weights: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    method_optimizer: OptimizerConfig | None = None
    schedule: Schedule = field(default_factory=Schedule)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = 0
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "Recipe: seed", "0 or more", self.seed)
        require(self.name.isprintable(), "Recipe: name", "printable text", self.name)
        method = self.method
        needs = method.label if method is not None and method.needs_teacher else "inherit" if self.inherit else None
        if needs and self.teacher is None:
            raise ValueError(f"Recipe: {needs} must have a teacher, got None; pass --teacher PATH/student.safetensors")
        if self.teacher is not None and needs is None:
            raise ValueError(
                f"Recipe: teacher must be None where neither the method nor inherit uses it, got {self.teacher!r}; "
                "pass --inherit or choose the recipe of a method with a teacher"
            )
        if self.method_optimizer is not None and self.method is None:
            raise ValueError("Recipe: method_optimizer must be None without a method, got an optimiser; leave it out")
        if self.distill.balance is not None and self.method is None:
            ratio = self.distill.balance
            raise ValueError(f"Recipe: distill.balance must be None without a method, got {ratio}; leave it out")
        if self.data.format == "crowdhuman" and self.with_masks:
            name = self.detector.detector
            raise ValueError(f"Recipe: detector must have no masks on crowdhuman data, got {name}; use faster_rcnn")
        if method is not None:
            method.check(self)

    @property
    def with_masks(self) -> bool:
        """Whether training and evaluation need instance masks."""
        return self.detector.with_masks

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON types; the key "kind" names the method's class."""
        return encode(self, kinds())

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Recipe:
        """The inverse of `to_dict`; unknown and missing fields raise with their name."""
        return decode(Recipe, complete(values), "recipe", kinds())


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe as JSON types with the fields that earlier versions did not write, at their defaults."""
    return {"distill": encode(DistillConfig(), {})} | values
