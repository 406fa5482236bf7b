"""The forward pass of one training step as a module that DDP can wrap: a batch in, weighted losses by name out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.detectors import Detector
from fastkd.detectors.common.folding import fold_norms
from fastkd.distillers import Distilled, Distiller
from fastkd.distillers.protocol import Ratio
from fastkd.training.balance import Balance
from fastkd.training.methods.phase import Phase
from fastkd.training.parallel.compiled import Regions
from fastkd.training.parallel.side_stream import SideStream
from fastkd.types import Batch

Teacher = Callable[[], list[Tensor]]  # waits for the teacher's forward pass and returns its outputs


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    """The total loss: the sum of all losses, in float32."""
    return torch.stack([value.float() for value in losses.values()]).sum()


def _instructive(distiller: Distiller, supervision: dict[str, Tensor]) -> dict[str, Tensor]:
    """The detector's losses on the instructive pyramid, prefixed and weighted."""
    weight = distiller.instructive_weight
    return {f"instructive_{name}": value if weight == 1 else weight * value for name, value in supervision.items()}


def gaps(student: dict[str, Tensor], instructive: dict[str, Tensor]) -> dict[str, Ratio]:
    """The detector's unweighted losses on the instructive pyramid, and how far the student's are above them.

    "gap" is the sum of the gaps of all losses, at equal weight.
    """
    figures = {f"instructive_loss_{name}": value for name, value in instructive.items()}
    differences = {name: student[name] - value for name, value in instructive.items()}
    figures |= {f"gap_{name}": value for name, value in differences.items()}
    figures["gap"] = sum_losses(differences)
    return {name: (value.detach(), torch.ones_like(value)) for name, value in figures.items()}


class FrozenTeacher:
    """A trained detector in eval mode without gradients.

    Not an nn.Module, so that a module with a FrozenTeacher attribute has it neither in its parameters nor in its
    state dict.

    Prepared for inference: frozen normalisations are folded into the preceding convolutions, and with a `dtype` the
    convolutions of backbone and neck store their weights in it, so that autocast does not cast them in every step.

    Args:
        detector: changed in place: set to eval mode, its parameters no longer require gradients.
        dtype: autocast to this type; None keeps the precision of the surrounding autocast.
    """

    def __init__(self, detector: Detector, dtype: torch.dtype | None = None):
        self.detector = detector.eval().requires_grad_(False)
        self.dtype = dtype
        fold_norms(detector)
        parts = detector.parts()
        for module in (*parts["backbone"].modules(), *parts["neck"].modules()):
            if dtype is not None and type(module) is nn.Conv2d:
                module.to(dtype)

    def to(self, device: torch.device, memory_format: torch.memory_format) -> FrozenTeacher:
        """Moves the detector; returns self."""
        self.detector.to(device).to(memory_format=memory_format)
        return self

    def pyramid(self, images: Tensor, regions: Regions | None = None) -> list[Tensor]:
        """The teacher's pyramid of a batch, without gradient; compiled if `regions` are enabled.

        Not in inference mode, because autograd saves these levels for the weight gradients of a method's projections.
        """
        kind = images.device.type
        low = torch.autocast(kind, dtype=self.dtype) if self.dtype is not None else contextlib.nullcontext()
        with torch.no_grad(), low:
            return (regions or Regions())("teacher", _features, self.detector, images)

    def cell_scores(self, pyramid: list[Tensor], regions: Regions | None = None) -> list[Tensor]:
        """The teacher's highest class probability in each cell of its pyramid: L tensors [B, 1, H_l, W_l]."""
        kind = pyramid[0].device.type
        low = torch.autocast(kind, dtype=self.dtype) if self.dtype is not None else contextlib.nullcontext()
        with torch.no_grad(), low:
            return (regions or Regions())("teacher scores", _cell_scores, self.detector, pyramid)


def _cell_scores(detector: Detector, pyramid: list[Tensor]) -> list[Tensor]:
    return detector.cell_scores(pyramid)


def _features(detector: Detector, images: Tensor) -> list[Tensor]:
    return detector.features(images)


def _of_part(name: str, figures: dict[str, Ratio]) -> dict[str, Ratio]:
    """Figures with the name of their part in front, where there are several."""
    return {f"{name}.{figure}" if name else figure: value for figure, value in figures.items()}


def _call(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    return module(*arguments, **options)


class StepModule(nn.Module):
    """The losses of a step.

    Args:
        detector: the student.
        distiller: a Distiller, several by name as an nn.ModuleDict, or None.
        teacher: for distillers that need one; not registered as a submodule.
        dtype: autocast to this type, or None for float32.
        regions: the functions to compile; None compiles nothing.
        balance: scales the methods' losses; None scales nothing.

    Attributes:
        detector_losses: names of the detector's own losses in the last step's result.
        measures: whether the next forward passes fill `diagnostics`; set by the trainer for the steps that it logs.
        diagnostics: figures of the methods in the last forward pass, "<part>.<figure>" of several methods; {} without
            `measures`.
    """

    def __init__(
        self,
        detector: Detector,
        distiller: nn.Module | None = None,
        teacher: FrozenTeacher | None = None,
        dtype: torch.dtype | None = None,
        regions: Regions | None = None,
        balance: Balance | None = None,
    ):
        super().__init__()
        self.detector = detector
        self.distiller = distiller
        for part in self.parts().values():
            if part.needs_teacher and teacher is None:
                raise ValueError(f"StepModule: teacher must be given for {type(part).__name__}, got None")
        self.teacher = teacher
        self.dtype = dtype
        self.regions = regions or Regions()
        self.balance = balance or Balance()
        self.side = SideStream()
        self.detector_losses: tuple[str, ...] = ()
        self.measures = False
        self.diagnostics: dict[str, Ratio] = {}

    def forward(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """The weighted losses of a batch; the total loss is their sum.

        Args:
            batch: on the module's device.
            phase: switches the method, its gradients and the backbone's updates.
        Returns: {name: float scalar}; the detector's losses, and the method's if `phase.distill`.
        """
        self.diagnostics = {}
        kind = batch.images.device.type
        with torch.autocast(kind, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            teacher = self._start_teacher(batch, phase)
            pyramid = self.regions("student", _features, self.detector, self.regions.mark_batch_static(batch.images))
            with self.regions.compiled_parts(self.detector):
                if self.distiller is None or not phase.distill:
                    losses = dict(self.detector.loss(pyramid, batch))
                    self.detector_losses = tuple(losses)
                    return losses
                return self._with_method(pyramid, batch, phase, teacher)

    def _start_teacher(self, batch: Batch, phase: Phase) -> Teacher | None:
        """Starts the teacher's forward pass, on a GPU in a side stream; None if no active method needs the teacher."""
        wanted = [part for name, part in self.parts().items() if part.needs_teacher and phase.of(name).distill]
        if not wanted or self.teacher is None:
            return None
        frozen, with_scores = self.teacher, any(part.needs_scores for part in wanted)

        def work() -> list[Tensor]:
            pyramid = frozen.pyramid(batch.images, self.regions)
            return [*pyramid, *frozen.cell_scores(pyramid, self.regions)] if with_scores else pyramid

        return self.side.start(work, [batch.images])

    def _with_method(
        self, pyramid: list[Tensor], batch: Batch, phase: Phase, teacher: Teacher | None
    ) -> dict[str, Tensor]:
        """The losses of detector and methods; one call of the head handles student and instructive pyramids."""
        made = {
            name: self.distill_by(distiller, pyramid, batch, phase.of(name), teacher)
            for name, distiller in self.parts().items()
            if phase.of(name).distill
        }
        instructive = {name: one.instructive for name, one in made.items() if one.instructive is not None}
        student, *taught = self.detector.losses([pyramid, *instructive.values()], batch)
        supervision = dict(zip(instructive, taught, strict=True))
        losses = dict(student)
        self.detector_losses = tuple(losses)
        if self.measures:
            self.diagnostics = self._measured(pyramid, batch, phase, teacher)
            for name, values in supervision.items():
                self.diagnostics |= _of_part(name, gaps(student, values))
        for name, one in made.items():
            teaches = not phase.of(name).detach_student
            losses |= self.balance.scaled(name, one.losses, student, pyramid) if teaches else one.losses
            if name in supervision:
                losses |= _instructive(self.parts()[name], supervision[name])
        return losses

    def distill(self, pyramid: list[Tensor], batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """The losses of the method alone on a student's pyramid; other arguments as in `forward`."""
        losses: dict[str, Tensor] = {}
        teacher = self._start_teacher(batch, phase)
        for name, distiller in self.parts().items():
            if phase.of(name).distill:
                made = self.distill_by(distiller, pyramid, batch, phase.of(name), teacher)
                losses |= made.losses
                if made.instructive is not None:
                    losses |= _instructive(distiller, self.detector.loss(made.instructive, batch))
        return losses

    def parts(self) -> dict[str, Any]:
        """The distillers by the name of their phase."""
        if self.distiller is None:
            return {}
        return dict(self.distiller.items()) if isinstance(self.distiller, nn.ModuleDict) else {"": self.distiller}

    def instructing(self, phase: Phase) -> dict[str, Any]:
        """The distillers that make an instructive pyramid in a phase, by name."""
        return {name: part for name, part in self.parts().items() if part.instructs and phase.of(name).distill}

    @torch.no_grad()
    def _measured(self, pyramid: list[Tensor], batch: Batch, phase: Phase, teacher: Teacher | None) -> dict[str, Ratio]:
        """The diagnostics of all active methods. After their forward passes: autocast keeps the weights that it cast
        there, and those cast here have no gradient."""
        found: dict[str, Ratio] = {}
        levels = [level.detach() for level in pyramid]
        for name, distiller in self.parts().items():
            if phase.of(name).distill:
                batch, levels, targets, options = self._inputs(distiller, levels, batch, teacher)
                found |= _of_part(name, distiller.diagnostics(levels, batch, targets, **options))
        return found

    def distill_by(
        self, distiller: Distiller, pyramid: list[Tensor], batch: Batch, phase: Phase, teacher: Teacher | None
    ) -> Distilled:
        """Runs one method on a student's pyramid.

        Args:
            teacher: returns the teacher's pyramid, followed by the scores of its cells if a method needs them; None if
                no method needs the teacher.
        """
        batch, pyramid, levels, options = self._inputs(distiller, pyramid, batch, teacher)
        options["detach_student"] = phase.detach_student
        return self.regions(type(distiller).__name__, _call, distiller, pyramid, batch, levels, **options)

    def _inputs(
        self, distiller: Distiller, pyramid: list[Tensor], batch: Batch, teacher: Teacher | None
    ) -> tuple[Batch, list[Tensor], list[Tensor] | None, dict[str, Any]]:
        """Batch, student's and teacher's pyramids and options of a distiller, with their dynamic sizes marked."""
        regions, options = self.regions, {}
        batch, pyramid = regions.mark_counts_dynamic(batch), regions.mark_batch_static(pyramid)
        levels = None
        if distiller.needs_teacher and teacher is not None:
            outputs = regions.mark_batch_static(teacher())
            levels = outputs[: len(pyramid)]
            if distiller.needs_scores:
                options["scores"] = outputs[len(pyramid) :]
        prepared = distiller.prepare(batch, [(level.shape[2], level.shape[3]) for level in pyramid])
        options["prepared"] = regions.mark_counts_dynamic(prepared)
        return batch, pyramid, levels, options

    def apply_phase(self, phase: Phase, trainable: frozenset[str]) -> bool:
        """Sets requires_grad and train/eval modes for a phase; returns whether any requires_grad changed.

        Args:
            phase: the phase.
            trainable: names of the parameters that are ever trained (a detector may have frozen stages).
        """
        self.train()
        backbone = self.detector.parts()["backbone"]
        of_backbone = {id(parameter) for parameter in backbone.parameters()}
        changed = False
        for name, parameter in self.named_parameters():
            wanted = name in trainable
            if name.startswith("distiller."):
                wanted = wanted and phase.of(name.split(".")[1]).distill
            elif id(parameter) in of_backbone:
                wanted = wanted and phase.train_backbone
            changed = changed or parameter.requires_grad != wanted
            parameter.requires_grad_(wanted)
        if not phase.train_backbone:
            backbone.eval()  # keeps the running statistics of batch norms, too
        return changed
