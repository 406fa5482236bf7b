"""One training step as a module: detector and method in, weighted losses by name out. DDP wraps it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.detectors import Detector
from fastkd.detectors.common.folding import fold_norms
from fastkd.distillers import FGFI, ICD, LGD
from fastkd.distillers.towers import share
from fastkd.training.parallel.compiled import Regions
from fastkd.training.parallel.side_stream import SideStream
from fastkd.training.schedule import Phase
from fastkd.types import Batch


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    """What is differentiated: the sum of all losses, in float32."""
    return torch.stack([value.float() for value in losses.values()]).sum()


def _instructive(lgd: LGD, supervision: dict[str, Tensor]) -> dict[str, Tensor]:
    """The detector's losses on the instructive pyramid as they join the sum."""
    weight = lgd.instructive_weight
    return {f"instructive_{name}": value if weight == 1 else weight * value for name, value in supervision.items()}


class FrozenTeacher:
    """A trained detector that only answers: eval mode, no gradient, in nobody's parameters or checkpoint.

    Not an nn.Module, so whoever holds one does not register it.

    It takes the form for inference: normalisations with fixed statistics become part of the convolutions before them,
    and with a `dtype` the convolutions of backbone and neck hold their weights in it, so that no step casts them again.

    Args:
        detector: put in eval mode, its parameters cut from autograd; changed in place.
        dtype: autocast to this type, or None for the precision of the surrounding autocast.
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
        """Itself, moved."""
        self.detector.to(device=device, memory_format=memory_format)
        return self

    def pyramid(self, images: Tensor, regions: Regions | None = None) -> list[Tensor]:
        """The teacher's pyramid of a batch, without gradient; compiled where `regions` are.

        Not in inference mode: a method's projections keep these levels for their weights' gradients.
        """
        kind = images.device.type
        low = torch.autocast(kind, dtype=self.dtype) if self.dtype is not None else contextlib.nullcontext()
        with torch.no_grad(), low:
            return (regions or Regions())("teacher", _features, self.detector, images)


def _features(detector: Detector, images: Tensor) -> list[Tensor]:
    return detector.features(images)


def _call(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    return module(*arguments, **options)


class StepModule(nn.Module):
    """The losses of a step.

    Args:
        detector: the student.
        distiller: LGD, ICD, FGFI, {"lgd": LGD, "icd": ICD} for both, or None.
        teacher: for ICD and FGFI; held, not registered.
        dtype: autocast to this type, or None for float32.
        regions: what is compiled of the step; None compiles nothing.

    Attributes:
        detector_losses: names of the detector's own losses in the last step's result.
    """

    def __init__(
        self,
        detector: Detector,
        distiller: LGD | ICD | FGFI | nn.ModuleDict | None = None,
        teacher: FrozenTeacher | None = None,
        dtype: torch.dtype | None = None,
        regions: Regions | None = None,
    ):
        super().__init__()
        for part in distiller.values() if isinstance(distiller, nn.ModuleDict) else (distiller,):
            if isinstance(part, (ICD, FGFI)) and teacher is None:
                raise ValueError(f"StepModule: teacher must be given for {type(part).__name__}, got None")
        self.detector = detector
        self.distiller = distiller
        self.teacher = teacher
        self.dtype = dtype
        self.regions = regions or Regions()
        self.side = SideStream()
        self.detector_losses: tuple[str, ...] = ()
        if isinstance(distiller, FGFI):
            if not detector.imitation_anchors():
                raise ValueError(
                    f"StepModule: distiller must not be FGFI for {detector.config.detector}, whose cells answer for no "
                    "boxes; use ICD or LGD"
                )
            for level, anchors in enumerate(detector.imitation_anchors()):
                self.register_buffer(f"anchors{level}", anchors.clone(), persistent=False)

    def forward(self, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """The weighted losses of a batch; their sum is what trains.

        Args:
            batch: on the module's device.
            phase: which parts run.
        Returns: {name: float scalar}; the detector's, and those of the method where `phase.distill`.
        """
        kind = batch.images.device.type
        with torch.autocast(kind, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            answer = self._ask_teacher(batch, phase)
            pyramid = self.regions("student", _features, self.detector, self.regions.fix_batch(batch.images))
            with self.regions.inside(self.detector):
                if self.distiller is None or not phase.distill:
                    losses = dict(self.detector.loss(pyramid, batch))
                    self.detector_losses = tuple(losses)
                    return losses
                return self._with_method(pyramid, batch, phase, answer)

    def _ask_teacher(self, batch: Batch, phase: Phase) -> Callable[[], list[Tensor]] | None:
        """Starts the teacher, on a GPU beside what follows; None where nobody wants to know in this phase."""
        if not any(isinstance(part, (ICD, FGFI)) and phase.of(name).distill for name, part in self._parts()):
            return None
        return self.side.start(lambda: self.teacher.pyramid(batch.images, self.regions), [batch.images])

    def _with_method(
        self, pyramid: list[Tensor], batch: Batch, phase: Phase, answer: Callable[[], list[Tensor]] | None
    ) -> dict[str, Tensor]:
        """The detector's losses and the method's. LGD's second call of the head is one with the first."""
        parts, instructive, lgd = {}, None, None
        shared = share(pyramid, 1 + sum(phase.of(name).distill for name, _ in self._parts()))
        for name, distiller in self._parts():
            if phase.of(name).distill:
                parts[name], pyramid_made = self.distill_by(distiller, shared.pop(), batch, phase.of(name), answer)
                if pyramid_made is not None:
                    instructive, lgd = pyramid_made, name
        student, *taught = self.detector.losses([shared.pop(), *([instructive] if lgd is not None else [])], batch)
        losses = dict(student)
        self.detector_losses = tuple(losses)
        for name, distiller in self._parts():
            losses |= parts.get(name, {})
            if name == lgd:
                losses |= _instructive(distiller, taught[0])
        return losses

    def distill(self, pyramid: list[Tensor], batch: Batch, phase: Phase) -> dict[str, Tensor]:
        """The losses of the method alone, on a pyramid of the student; arguments as of `forward`."""
        losses: dict[str, Tensor] = {}
        answer = self._ask_teacher(batch, phase)
        for name, distiller in self._parts():
            if phase.of(name).distill:
                own, instructive = self.distill_by(distiller, pyramid, batch, phase.of(name), answer)
                losses |= own
                if instructive is not None:
                    losses |= _instructive(distiller, self.detector.loss(instructive, batch))
        return losses

    def _parts(self) -> list[tuple[str, LGD | ICD | FGFI]]:
        """The methods with the names of their phases."""
        return list(self.distiller.items()) if isinstance(self.distiller, nn.ModuleDict) else [("", self.distiller)]

    def distill_by(
        self,
        distiller: LGD | ICD | FGFI,
        pyramid: list[Tensor],
        batch: Batch,
        phase: Phase,
        answer: Callable[[], list[Tensor]] | None,
    ) -> tuple[dict[str, Tensor], list[Tensor] | None]:
        """The losses of a method on a pyramid of the student, and LGD's instructive pyramid.

        Args:
            answer: gives the teacher's pyramid; None for LGD.
        """
        regions = self.regions
        batch, pyramid = regions.free_counts(batch), regions.fix_batch(pyramid)
        if isinstance(distiller, LGD):
            options = {"detach_student": phase.detach_student, "places": regions.free_counts(distiller.prepare(batch))}
            losses, instructive = regions("lgd", _call, distiller, pyramid, batch, **options)
            return dict(losses), instructive
        teacher = regions.fix_batch(answer())
        if isinstance(distiller, ICD):
            prepared = distiller.prepare(batch, [tuple(level.shape[2:]) for level in teacher])
            regions.free_counts(prepared.draws)
            options = {"detach_student": phase.detach_student, "prepared": prepared}
            return regions("icd", _call, distiller, pyramid, teacher, batch, **options), None
        anchors = [getattr(self, f"anchors{level}") for level in range(len(pyramid))]
        return regions("fgfi", _call, distiller, pyramid, teacher, batch, anchors), None

    def apply_phase(self, phase: Phase, trainable: frozenset[str]) -> bool:
        """Switches gradients and modes to a phase; returns whether any parameter's requires_grad changed.

        Args:
            phase: the phase.
            trainable: names of the parameters that train at all (a detector may have frozen stages of its own).
        """
        self.train()
        changed = False
        for name, parameter in self.named_parameters():
            wanted = name in trainable
            if name.startswith("distiller."):
                two = isinstance(self.distiller, nn.ModuleDict)
                wanted = wanted and (phase.of(name.split(".")[1]) if two else phase).distill
            elif name.startswith("detector.backbone."):
                wanted = wanted and phase.train_backbone
            changed = changed or parameter.requires_grad != wanted
            parameter.requires_grad_(wanted)
        if not phase.train_backbone:
            self.detector.parts()["backbone"].eval()  # batch statistics stay as they are, too
        return changed
