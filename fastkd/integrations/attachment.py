"""The core shared by all hosts: computes a method's losses in a host's training step and trains its modules."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.distillers.protocol import Distiller
from fastkd.integrations.methods import METHODS, HostFacts, check_method, needs_scores, needs_teacher, settings_of
from fastkd.integrations.network import MethodNetwork
from fastkd.integrations.optimizer import MethodOptimizer, rate_for
from fastkd.integrations.priors import MEASURED_STEPS, RunningPriors, check_priors
from fastkd.integrations.pyramids import PyramidSpec, check_pyramid, match_levels, unit_scale
from fastkd.integrations.report import Probe
from fastkd.integrations.traces import preserved_randomness
from fastkd.types import Batch, ClassPriors

FORMAT = 2
DETACHED_STEPS = 100  # without total_steps: steps in which the distillation loss does not reach the student
WARN_AFTER = 200  # batches without a single step()


@dataclass
class HostStep:
    """Inputs of a method from one training step of a host.

    Args:
        batch: images exactly as the student got them, boxes in their pixels.
        student: L tensors [B, C_l, H_l, W_l], finest first, in the autograd graph of the host's loss; channels may
            differ between levels.
        teacher: levels of the same images, without gradient; None for methods without a teacher.
        rerun: runs the host's head and loss on another pyramid of the same shapes -> {name: scalar}, without changing
            its batch statistics; None if the host cannot, which rules out LGD.
        scores: L tensors [B, 1, H_l, W_l] in [0, 1], the highest class probability in each cell of the teacher's
            levels, for methods that need them (score-weighted L2). An `Attachment` takes them from its teacher.
    """

    batch: Batch
    student: Sequence[Tensor]
    teacher: Sequence[Tensor] | None = None
    rerun: Callable[[list[Tensor]], dict[str, Tensor]] | None = None
    scores: Sequence[Tensor] | None = None


class Distillation:
    """A distillation method in a host: `losses = distillation(HostStep(...))`, later `distillation.step()`.

    The method's modules are built in the first step, when the pyramids are known. They have a separate optimiser, with
    a learning rate schedule over the host's run. A step does not advance the host's random generators. A Distillation
    is not an nn.Module, so that a host which holds it does not train, average or save it.

    Args:
        method: "icd", "lgd", "fgfi", "pkd", "cwd", "scorel2" or a `Distiller`.
        num_classes: object classes, without background.
        priors: class priors of the training set, for ICD's fake queries; None measures them from the first batches.
        two_stage: the host has a region proposal network (selects the published weights).
        anchors: L tensors [A, 4] xyxy of the cell at the origin, for FGFI.
        channels: width of the method; None takes the student's if all levels have the same, else its largest, at most
            256.
        total_steps: optimiser steps of the host's run; None keeps the rate constant.
        detach_steps: first steps, in which the distillation loss does not reach the student; None takes the published
            fraction of total_steps (ICD, FGFI 1/90, LGD 1/6), or 100 steps if total_steps is unknown.
        lr: learning rate of AdamW for the method's modules; None: the published 1e-4 in runs of 90,000 steps or of
            unknown length, up to ten times as much in shorter ones (`optimizer.rate_for`).
        weight_decay: of the same AdamW.
        weight: finite factor on all losses of the method that reach the student.
        seed: seed of the method's initial weights and random numbers.
    """

    def __init__(
        self,
        method: str | Distiller = "icd",
        *,
        num_classes: int,
        priors: ClassPriors | None = None,
        two_stage: bool = False,
        anchors: Sequence[Tensor] | None = None,
        channels: int | None = None,
        total_steps: int | None = None,
        detach_steps: int | None = None,
        lr: float | None = None,
        weight_decay: float = 1e-4,
        weight: float = 1.0,
        seed: int = 0,
    ):
        check_method(method)
        check_priors(priors)
        if num_classes < 1:
            raise ValueError(f"Distillation: num_classes must be at least 1, got {num_classes}; leave out background")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"Distillation: total_steps must be at least 1, got {total_steps}; or None if unknown")
        if not math.isfinite(weight):
            raise ValueError(f"Distillation: weight must be finite, got {weight}; 1 is the published value")
        self.method, self.given_priors = method, priors
        self.facts = HostFacts(num_classes, two_stage, anchors, channels)
        self.total_steps, self.detach_steps, self.lr, self.weight_decay = total_steps, detach_steps, lr, weight_decay
        self.weight, self.seed = weight, seed
        self.network: MethodNetwork | None = None
        self.optimizer: MethodOptimizer | None = None
        self.running: RunningPriors | None = None
        self.probe = Probe()
        self.detach_fraction = 0.0
        self.teacher_scale = 1.0  # on the teacher's pyramid in ICD by name; measured in the first step
        self.steps = self.computed = self.computed_since_step = 0
        self.finite: Tensor | bool = True  # whether the losses of the last batch were
        self._loaded: dict[str, Any] | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether a HostStep must hold the teacher's pyramid."""
        return needs_teacher(self.method)

    @property
    def needs_scores(self) -> bool:
        """Whether a HostStep must hold the teacher's class scores."""
        return needs_scores(self.method)

    @property
    def wants_masks(self) -> bool:
        """Whether a batch must hold instance masks."""
        return bool(getattr(self.method, "use_masks", False))

    @property
    def fraction(self) -> float:
        """Completed fraction of the host's run; 0 if its length is unknown."""
        return self.steps / self.total_steps if self.total_steps else 0.0

    def __deepcopy__(self, memo: dict) -> Distillation:
        return self

    def __call__(self, step: HostStep) -> dict[str, Tensor]:
        """The weighted losses of a step; the host adds their sum to its loss. All are 0 if one is not finite.

        Raises: ValueError or TypeError if pyramids or batch do not fit, before any state of the host is changed.
        """
        student, teacher = self.check(step)
        with preserved_randomness(student[0].device):
            return self._losses(step, student, teacher)

    def check(self, step: HostStep) -> tuple[list[Tensor], list[Tensor] | None]:
        """The levels of student and teacher. In a distributed run it does not wait for the other processes.

        Raises: ValueError or TypeError if they do not fit.
        """
        student = check_pyramid("student", step.student, len(step.batch))
        teacher = None
        if self.needs_teacher:
            if step.teacher is None:
                raise ValueError("Distillation: this method needs HostStep.teacher, got None; pass a teacher")
            teacher = check_pyramid("teacher", step.teacher, len(step.batch))
        widths = tuple(level.shape[1] for level in student)
        if self.network is not None and widths != self.network.spec.student:
            raise ValueError(
                f"Distillation: student must have the levels of the first step {self.network.spec.student}, got "
                f"{widths}; attach anew after changing the model"
            )
        return student, teacher

    def _losses(self, step: HostStep, student: list[Tensor], teacher: list[Tensor] | None) -> dict[str, Tensor]:
        network = self._ready(student, teacher, step.batch)
        self._measure(step.batch)
        distilled = network(student, step.batch, teacher, detach_student=self._detached(), scores=step.scores)
        losses = {name: self.weight * loss for name, loss in distilled.losses.items()}
        if distilled.instructive is not None:
            losses |= self._rerun(step, distilled.instructive, network.method)
        self.computed, self.computed_since_step = self.computed + 1, self.computed_since_step + 1
        self._warn_without_steps()
        if self.probe.due(self.computed):
            self.probe.measure(self.computed, losses, student, step)
        self.finite = finite = torch.stack([loss.detach().isfinite() for loss in losses.values()]).all()
        return network.record.watch({name: torch.where(finite, loss, 0.0) for name, loss in losses.items()})

    def step(self) -> None:
        """Updates the method's modules; call it after the step of the host's optimiser."""
        self.steps, self.computed_since_step = self.steps + 1, 0
        if self.optimizer is not None:
            self.optimizer.step(self.fraction)

    def build(self, spec: PyramidSpec, device: torch.device) -> MethodNetwork:
        """Builds the method's modules for these pyramids."""
        # Only the CPU's generator is seeded, even where another device is the default.
        with preserved_randomness(torch.device("cpu")), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)
            method = self.method
            if isinstance(method, str):
                facts = dataclasses.replace(self.facts, teacher_scale=self.teacher_scale)
                method = METHODS[method][0](facts, spec, self._priors(device))
            network = MethodNetwork(method, spec).to(device).train()
        settings = settings_of(method)
        self.network, self.detach_fraction = network, settings.detach_fraction
        rate = rate_for(self.total_steps) if self.lr is None else self.lr
        self.optimizer = MethodOptimizer(
            network.parameters(), network.record, lr=rate, weight_decay=self.weight_decay, clip=settings.clip
        )
        return network

    def _ready(self, student: list[Tensor], teacher: list[Tensor] | None, batch: Batch) -> MethodNetwork:
        network = self.network
        if network is None:
            spec = match_levels(student, teacher, batch.padded_size)
            if self._loaded is None:
                if teacher is not None:
                    self.teacher_scale = unit_scale([teacher[level] for _, level in spec.pairs])
                return self.build(spec, student[0].device)
            if dataclasses.astuple(spec) != dataclasses.astuple(self._loaded_spec()):
                raise ValueError(
                    f"Distillation: the checkpoint's pyramids must be those of this run {spec}, got "
                    f"{self._loaded_spec()}; resume with the student and teacher of the first run"
                )
            self.teacher_scale = self._loaded["teacher_scale"]
            network = self.build(spec, student[0].device)
            self._restore(self._loaded)
            self._loaded = None
        return network

    def _priors(self, device: torch.device) -> ClassPriors:
        if self.given_priors is not None:
            return self.given_priors
        self.running = RunningPriors(self.facts.num_classes, device)
        return self.running.priors()

    def _measure(self, batch: Batch) -> None:
        """Updates ICD's priors during the first batches; afterwards they are fixed."""
        if self.running is None or self.running.steps >= MEASURED_STEPS or self.network is None:
            return
        self.running.add_batch(batch)
        priors = self.running.priors()
        for name in ("frequency", "mean", "std"):
            buffer = getattr(self.network.method, f"prior_{name}", None)
            if buffer is not None:
                buffer.copy_(getattr(priors, name))

    def _detached(self) -> bool:
        if self.detach_steps is not None:
            return self.steps < self.detach_steps
        if self.total_steps is None:
            return self.detach_fraction > 0 and self.steps < DETACHED_STEPS
        return self.fraction < self.detach_fraction

    def _rerun(self, step: HostStep, instructive: list[Tensor], method: Distiller) -> dict[str, Tensor]:
        if step.rerun is None:
            raise ValueError(
                f"Distillation: {type(method).__name__} needs HostStep.rerun, got None; give the host's head and loss "
                "as a function of a pyramid"
            )
        # Infinite features would write gradients of NaN into the host's head, even if the losses counted 0 afterwards.
        # So the head gets zeros, and the losses are NaN, which counts 0 later.
        finite = torch.stack([level.detach().isfinite().all() for level in instructive]).all()
        losses = step.rerun([torch.where(finite, level, 0.0) for level in instructive])
        prefix = self.method if isinstance(self.method, str) else type(method).__name__.lower()
        return {
            f"{prefix}_{name}": torch.where(finite, method.instructive_weight * loss, math.nan)
            for name, loss in losses.items()
        }

    def _warn_without_steps(self) -> None:
        if self.computed_since_step == WARN_AFTER:
            warnings.warn(
                f"fastkd: {WARN_AFTER} batches without kd.step(): the method's own modules do not learn; call "
                "kd.step() after optimizer.step()",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The state for resuming, in types that torch.load(weights_only=True) can load."""
        if self.network is None:
            return self._loaded or {"format": FORMAT, "steps": self.steps, "computed": self.computed, "spec": None}
        return {
            "format": FORMAT,
            "steps": self.steps,
            "computed": self.computed,
            "spec": [list(self.network.spec.student), list(self.network.spec.teacher), list(self.network.spec.pairs)],
            "teacher_scale": self.teacher_scale,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else {},
            "running": self.running.state_dict() if self.running else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of `state_dict`; before the first step, restoring is deferred until that step.

        Raises: ValueError for a state of another format or of other pyramids.
        """
        if state.get("format") != FORMAT:
            raise ValueError(
                f"Distillation: state must be of format {FORMAT}, got {state.get('format')!r}; pass the file that "
                "kd.save() wrote"
            )
        self.steps, self.computed = state["steps"], state["computed"]
        if state["spec"] is None:
            return
        if self.network is None:
            self._loaded = state
        else:
            self._restore(state)

    def _loaded_spec(self) -> PyramidSpec:
        student, teacher, pairs = (self._loaded or {})["spec"]
        return PyramidSpec(tuple(student), tuple(teacher), tuple(tuple(pair) for pair in pairs))

    def _restore(self, state: dict[str, Any]) -> None:
        assert self.network is not None and self.optimizer is not None
        self.network.load_state_dict(state["network"])
        self.teacher_scale = state["teacher_scale"]
        method: Any = self.network.method
        if isinstance(self.method, str) and hasattr(method, "teacher_scale"):
            method.teacher_scale = self.teacher_scale
        self.optimizer.load_state_dict(state["optimizer"])
        if self.running is not None and state["running"] is not None:
            self.running.load_state_dict(state["running"])

    def save(self, path: str | os.PathLike) -> None:
        """Writes the checkpoint atomically; the host's checkpoint does not include it."""
        partial = f"{os.fspath(path)}.partial"
        torch.save(self.state_dict(), partial)
        os.replace(partial, path)

    def load(self, path: str | os.PathLike) -> None:
        """Restores a file written by `save`, also before the first step."""
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def report(self) -> str:
        """A report on losses and gradients in this host, see `Probe.text`."""
        return self.probe.text(self)
