"""The candidates of `benchmarks.step`: whole steps of student, methods and teacher, in plain torch and with fastkd."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.step.plain_detectors import PlainDetector
from fastkd.detectors import build_detector
from fastkd.ops import use_backend
from fastkd.training.build import build_distiller
from fastkd.training.config import Recipe
from fastkd.training.methods.protocol import Given
from fastkd.training.optimizers import build_optimizers
from fastkd.training.parallel.compiled import Regions
from fastkd.training.recipes.named import get_recipe
from fastkd.training.schedule import Phase
from fastkd.training.step import FrozenTeacher, StepModule, sum_losses
from fastkd.types import Batch, ClassPriors

FORMS = ("plain", "float32", "plain-bfloat16", "bfloat16")
OPTIONS = ("recompute", "compile")  # options of the trainer, in addition to bfloat16
METHODS = ("student", "lgd", "icd", "fgfi", "teacher")
NUM_CLASSES = 80


@dataclass(frozen=True)
class Problem:
    """The detector and batch of a step.

    Args:
        detector: as in recipe names, "retinanet" or "faster-rcnn".
        images: B. boxes: per image. height, width: pixels.
    """

    detector: str = "retinanet"
    images: int = 1
    boxes: int = 7
    height: int = 800
    width: int = 1216

    def batch(self, seed: int = 0) -> Batch:
        """Noise images with boxes of 0.1 to 0.5 of the image size."""
        generator = torch.Generator().manual_seed(seed)
        total, sides = self.images * self.boxes, torch.tensor([self.width, self.height])
        size = (0.1 + 0.4 * torch.rand(total, 2, generator=generator)) * sides
        low = torch.rand(total, 2, generator=generator) * (sides - size)
        return Batch(
            images=torch.randn(self.images, 3, self.height, self.width, generator=generator),
            image_sizes=torch.tensor([[self.height, self.width]] * self.images),
            boxes=torch.cat([low, low + size], dim=1),
            labels=torch.randint(NUM_CLASSES, (total,), generator=generator),
            image_index=torch.arange(self.images).repeat_interleave(self.boxes),
            counts=[self.boxes] * self.images,
            seeds=list(range(self.images)),
        )


class Candidate:
    """A candidate that executes training steps.

    Args:
        forward: batch -> losses by name.
        optimizers: torch optimisers; update: steps them and clears the gradients.
        module: student and method; frozen: the teacher, or None; ask: the teacher's forward, or None.
        batch: the batch of every step.
        compiled: whether it uses torch.compile.
    """

    def __init__(
        self,
        forward: Callable[[Batch], dict[str, Tensor]],
        optimizers: list[torch.optim.Optimizer],
        update: Callable[[], object],
        module: nn.Module,
        frozen: nn.Module | None,
        ask: Callable[[Batch], object] | None,
        batch: Batch,
        compiled: bool = False,
    ):
        self.forward, self.optimizers, self.update = forward, optimizers, update
        self.module, self.frozen, self.batch, self.compiled = module, frozen, batch, compiled
        self.teacher = None if ask is None else lambda: ask(self.batch)

    def on(self, batch: Batch, work: Callable[[], object]) -> None:
        """Run work() on another batch."""
        own, self.batch = self.batch, batch.to("cpu", memory_format=memory_format_of(self.batch.images))
        work()
        self.batch = own

    def resident(self) -> list[Tensor]:
        """Tensors that persist between steps."""
        held = {id(t): t for m in (self.module, self.frozen) if m for t in (*m.parameters(), *m.buffers())}
        states = [
            value for optimizer in self.optimizers for state in optimizer.state.values() for value in state.values()
        ]
        return [*held.values(), *(value for value in states if isinstance(value, Tensor))]

    def step(self) -> None:
        """Forward, backward, update."""
        sum_losses(self.forward(self.batch)).backward()
        self.update()

    def timed(self) -> float:
        """Seconds of one step."""
        begin = time.perf_counter()
        self.step()
        return time.perf_counter() - begin


def memory_format_of(images: Tensor) -> torch.memory_format:
    """Channels-last or contiguous."""
    return torch.contiguous_format if images.is_contiguous() else torch.channels_last


def priors() -> ClassPriors:
    """Class priors of objects a quarter of an image wide."""
    side = torch.full((NUM_CLASSES, 2), 0.25, dtype=torch.float64)
    return ClassPriors(torch.full((NUM_CLASSES,), 1 / NUM_CLASSES, dtype=torch.float64), side, side / 2)


def is_low(form: str) -> bool:
    """Whether a form computes in bfloat16 with channels-last tensors."""
    return form not in ("plain", "float32")


def recipe_of(detector: str, method: str, form: str) -> Recipe:
    """The COCO recipe of a candidate in a precision."""
    recipe = get_recipe(f"coco-{detector}-{'baseline' if method == 'student' else method}")
    low = is_low(form)
    runtime = dataclasses.replace(
        recipe.runtime,
        precision="bfloat16" if low else "float32",
        channels_last=low,
        recompute=form == "recompute",
        compile=form == "compile",
    )
    return dataclasses.replace(recipe, runtime=runtime)


def ours(problem: Problem, method: str, form: str) -> Candidate:
    """A candidate as built by the trainer, after the first phases of its schedule."""
    torch.manual_seed(0)
    recipe = recipe_of(problem.detector, method, form)
    layout = torch.channels_last if recipe.runtime.channels_last else torch.contiguous_format
    student = build_detector(recipe.detector)
    if recipe.runtime.recompute:
        student.parts()["backbone"].recompute()
    teacher = None
    if recipe.method is not None and recipe.method.needs_teacher:
        teacher = build_detector(recipe_of(problem.detector, "teacher", form).detector)
    distiller = build_distiller(recipe, Given(student, teacher, priors(), recipe.runtime.recompute))
    dtype = torch.bfloat16 if recipe.runtime.precision == "bfloat16" else None
    frozen = FrozenTeacher(teacher, dtype) if teacher is not None else None
    module = StepModule(student, distiller, frozen, dtype, Regions(recipe.runtime.compile))
    module.to(memory_format=layout).train()
    if module.teacher is not None:
        module.teacher.to(torch.device("cpu"), layout)
    phase = Phase(distill=distiller is not None)
    optimizers = build_optimizers(recipe, module)
    batch = problem.batch().to("cpu", memory_format=layout)

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return Candidate(
        lambda batch: module(batch, phase),
        [optimizer.optimizer for optimizer in optimizers],
        update,
        module,
        None if module.teacher is None else module.teacher.detector,
        None if module.teacher is None else lambda batch: module.teacher.pyramid(batch.images),
        batch,
        recipe.runtime.compile,
    )


class PlainStep(nn.Module):
    """Student and method in plain torch; the frozen teacher is a plain torchvision backbone.

    LGD is fastkd's module with the reference ops.
    """

    def __init__(self, detector: PlainDetector, distiller: nn.Module | None, teacher: PlainDetector | None):
        super().__init__()
        self.detector, self.distiller = detector, distiller
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses by name."""
        pyramid = self.detector.features(batch.images)
        losses = dict(self.detector.loss(pyramid, batch))
        if self.distiller is None:
            return losses
        teacher = self.ask(batch) if self.teacher is not None else None
        with use_backend("reference"):
            made = self.distiller(pyramid, batch, teacher)
        if made.instructive is not None:
            supervision = self.detector.loss(made.instructive, batch)
            losses |= {f"instructive_{name}": value for name, value in supervision.items()}
        return losses | made.losses

    @torch.no_grad()
    def ask(self, batch: Batch) -> list[Tensor]:
        """The teacher's pyramid."""
        return self.teacher.features(batch.images)


def plain(problem: Problem, method: str, low: bool = False) -> Candidate:
    """A candidate in plain torch, with torch's default optimisers; low: under bfloat16 autocast, channels-last."""
    torch.manual_seed(0)
    kind = problem.detector.replace("-", "_")
    recipe = recipe_of(problem.detector, method, "float32")
    student = PlainDetector(kind, NUM_CLASSES, recipe.detector.backbone)
    needs_teacher = recipe.method is not None and recipe.method.needs_teacher
    teacher = PlainDetector(kind, NUM_CLASSES, "resnet101") if needs_teacher else None
    shape = _Shape(NUM_CLASSES, recipe.detector.channels)
    distiller = build_distiller(recipe, Given(shape, shape, priors()))
    module = PlainStep(student.train(), distiller, teacher)
    own = list(distiller.parameters()) if recipe.method_optimizer is not None else []
    mine = {id(parameter) for parameter in own}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in mine]
    rate = recipe.optimizer.learning_rate
    sgd = torch.optim.SGD(rest, lr=rate, momentum=0.9, weight_decay=1e-4)
    adamw = torch.optim.AdamW(own, lr=1e-4, weight_decay=1e-4) if own else None

    def update() -> None:
        if adamw is not None:
            nn.utils.clip_grad_norm_(own, recipe.method_optimizer.clip_norm)
            adamw.step()
            adamw.zero_grad()
        sgd.step()
        sgd.zero_grad()

    def autocast(batch: Batch) -> torch.autocast:
        return torch.autocast(batch.images.device.type, torch.bfloat16, enabled=low)

    def forward(batch: Batch) -> dict[str, Tensor]:
        with autocast(batch):
            return module(batch)

    def ask(batch: Batch) -> list[Tensor]:
        with autocast(batch):
            return module.ask(batch)

    layout = torch.channels_last if low else torch.contiguous_format
    module.to(memory_format=layout)
    batch = problem.batch().to("cpu", memory_format=layout)
    optimizers = [sgd] if adamw is None else [sgd, adamw]
    return Candidate(forward, optimizers, update, module, teacher, ask if teacher else None, batch)


@dataclass(frozen=True)
class _Shape:
    """The attributes of student and teacher that LGD and ICD use."""

    num_classes: int
    channels: int


def build(problem: Problem, method: str, form: str) -> Candidate:
    """Build a candidate; method from METHODS, form from FORMS or OPTIONS.

    The plain form of a method is its distiller with the reference ops.
    """
    if form.startswith("plain"):
        return plain(problem, method, is_low(form))
    return ours(problem, method, form)
