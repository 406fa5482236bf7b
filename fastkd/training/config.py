"""What a training run is made of: frozen dataclasses, validated when they are built, that go to JSON and back.

Every length of time but `Schedule.steps` is a fraction of the run, so that a shorter or longer run keeps its shape:
`--schedule.steps 100` moves the warm-up, the learning rate drops and the distillation phases along.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fastkd.codec import decode, encode, require
from fastkd.detectors import DetectorConfig
from fastkd.training.methods import Method, kinds
from fastkd.training.optimizer_config import OptimizerConfig


@dataclass(frozen=True)
class DataConfig:
    """Where the images and annotations are and how images enter the network.

    Args:
        root: folder of the data set; the four paths below are relative to it (absolute ones are taken as they are).
        train_annotations: annotation file to train on.
        train_images: folder of its images.
        val_annotations: annotation file to evaluate on.
        val_images: folder of its images.
        format: of the annotation files: "coco" (JSON) or "crowdhuman" (odgt, evaluated by AP, MR^-2 and JI).
        crowd_boxes: what the objects are in the crowdhuman format: "full", "visible" or "head" boxes.
        short_sides: lengths of the short side, pixels; each training image draws one.
        val_short_side: length of the short side in evaluation, pixels.
        max_side: longest side after resizing, pixels.
        flip: flip half of the training images horizontally.
        divisor: batches are padded to a multiple of this, pixels.
        aspect_grouping: put images of like aspect ratio into one batch (less padding).
        match_classes: take the number of classes from the training annotations; False makes a difference an error.
        strict: treat a bad box or image as an error instead of a counted skip.
        val_batch_size: images of one evaluation batch of one process.
        workers: loader processes of each rank; changes the speed, never the batches.
        prefetch: batches each of them makes ahead.
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
    """How long to train and on how many images at a time.

    Args:
        steps: optimiser steps.
        batch_size: images of one step over all processes and accumulated parts.
        accumulate: parts a step's images are taken in, one after the other, to save memory.
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
class RuntimeConfig:
    """How the run is carried out. Only `precision`, `channels_last`, `compile`, `ops`, `deterministic` and
    `grad_compression` can change its numbers.

    Args:
        precision: "bfloat16" runs under autocast, "float32" does not.
        channels_last: images and weights in channels-last memory order.
        compile: run features, head, method and frozen teacher through torch.compile (needs a C++ compiler, on a GPU
            Triton): fewer, larger kernels after some minutes of compilation. Rounding alone differs from the run
            without; a resumed run equals an uninterrupted one up to rounding where images differ in size.
        deterministic: ask torch for deterministic kernels on the GPU, so that resuming there is bit-exact too.
        recompute: keep no activations inside of the backbone's blocks and of LGD's branches, but compute them again in
            the backward pass: less memory for more time, the same numbers. ResNets without batch statistics only.
        ops: "compiled" takes the kernels where there are any, "reference" plain torch for every op: the specification,
            to compare a run with.
        grad_compression: type in which several processes send each other their gradients: "bf16" or "fp16" halves the
            bytes, "none" leaves them in float32. fp16 cannot hold gradients beyond 65504.
        timeout: minutes a process waits for the others before the run ends with an error.
        log_every: steps between two lines of log.jsonl.
        checkpoint_every: steps between two checkpoints.
        keep_last: checkpoints kept.
        eval_every: steps between two evaluations; 0 evaluates at the end only.
        ledger_pairs: pairs of steps timed for the cost ledger, student alone and with the method; 0 leaves it out.
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
    ledger_pairs: int = 4

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
    """Everything that decides the outcome of a run.

    Args:
        name: of the recipe; also the default name of the run directory.
        detector: the student.
        data: images, annotations and augmentation.
        method: distillation method; None trains the detector alone.
        teacher: file of a trained detector (a run's student.safetensors), for methods that need one and for inheriting;
            "asset:NAME" is one that ships with fastkd.
        inherit: start neck and head from the teacher's where names and shapes agree.
        backbone_weights: file of pretrained weights (torchvision names) or "asset:NAME"; None starts at random.
        optimizer: of the student, and of the method where `method_optimizer` is None.
        method_optimizer: of the method's own parameters.
        schedule: steps and batch size.
        runtime: precision, logging, checkpoints.
        seed: of initial weights, data order and everything drawn during training.
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

    def __post_init__(self) -> None:
        require(self.seed >= 0, "Recipe: seed", "0 or more", self.seed)
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
        """The recipe as JSON types; a method says which one it is under "kind"."""
        return encode(self, kinds())

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Recipe:
        """The recipe `to_dict` wrote; unknown and missing fields raise with their name."""
        return decode(Recipe, values, "recipe", kinds())
