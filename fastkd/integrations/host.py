"""Base class of the attachments to a host's model: hooks, handling of failures, detaching."""

from __future__ import annotations

import functools
import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.integrations.attachment import Distillation, HostStep
from fastkd.integrations.batches import warn_again
from fastkd.integrations.hooks import Hook, check_plain, check_unattached
from fastkd.integrations.processes import Agreement
from fastkd.integrations.teachers import Normalization, Teacher
from fastkd.integrations.traces import preserved_randomness

MAX_FAILURES = 3  # consecutive failed batches, after which distillation stops
CHECKED_STEPS, CHECK_EVERY = 20, 100  # in the first steps and later in some, values are checked on a GPU, too


@dataclass(frozen=True)
class State:
    """Progress of an attachment.

    Args:
        attached: whether the hooks are attached.
        steps: updates of the method's modules.
        computed: batches whose losses were computed.
        failures: consecutive failed batches; after MAX_FAILURES distillation stops.
        losses: detached losses of the last batch by name.
    """

    attached: bool
    steps: int
    computed: int
    failures: int
    losses: dict[str, float]


class Attachment:
    """A method attached to a host's model by hooks; `detach` removes them.

    If the method fails after its first batch, it warns and the batch trains without distillation, in a distributed run
    in all processes.

    Args:
        model: the host's model, neither compiled nor wrapped.
        distillation: the method.
        teacher: teacher for methods that need one.
        normalization: normalisation of the images that the host's model gets.
    """

    def __init__(
        self,
        model: nn.Module,
        distillation: Distillation,
        teacher: Teacher | None = None,
        normalization: Normalization | None = None,
    ):
        check_plain(model)
        check_unattached(model)
        if teacher is not None and not set(model.parameters()).isdisjoint(teacher.module.parameters()):
            teacher.restore()
            raise ValueError(
                "attach: teacher must be another model than the student, got one with parameters of the student, which "
                "would be frozen; pass a trained detector, or a copy.deepcopy of the student"
            )
        if distillation.needs_teacher and teacher is None:
            raise ValueError(
                "attach: this method needs a teacher, got None; pass teacher=<trained detector>, or use method='lgd'"
            )
        if distillation.needs_scores and teacher is not None and teacher.scores is None:
            raise ValueError(
                f"attach: this method needs class scores of the teacher's cells, got a {type(teacher.module).__name__} "
                "for which fastkd has none; pass Teacher(module, scores=...), or use another method such as 'icd'"
            )
        self.model: Any = model  # its parts are the host's
        self.distillation, self.teacher = distillation, teacher
        self.normalization = normalization or Normalization()
        self.failures, self._succeeded = 0, False
        self.losses: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self.on_detach: list[Callable[[], None]] = [] if teacher is None else [teacher.restore]
        self._on_inputs, self._on_losses, self._on_update = Agreement(), Agreement(), Agreement()
        warn_again()

    def __deepcopy__(self, memo: dict) -> Attachment:
        return self

    def hook(self, module: nn.Module, function: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """Registers a forward hook function(module, args[, kwargs], output), which `detach` removes."""
        hook = Hook(torch.compiler.disable(function))
        self._handles.append(module.register_forward_hook(hook, with_kwargs=with_kwargs))

    def pre_hook(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Registers a forward pre-hook function(module, args, kwargs), which `detach` removes."""
        hook = Hook(torch.compiler.disable(function))
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    @property
    def active(self) -> bool:
        """Whether to distil in this forward pass: train mode, gradients enabled, fewer than MAX_FAILURES failures."""
        return self.model.training and torch.is_grad_enabled() and self.failures < MAX_FAILURES

    def check_values(self, device: torch.device) -> bool:
        """Whether to check the values of this batch's targets and losses: always on a CPU, at times on a GPU."""
        computed = self.distillation.computed
        return device.type == "cpu" or computed < CHECKED_STEPS or computed % CHECK_EVERY == 0

    def distil(self, device: torch.device, make_step: Callable[[], HostStep]) -> dict[str, Tensor]:
        """The losses of a batch; {} if the method fails, in a distributed run in any process.

        Raises: any exception of the first batch, since the host's run has made no progress yet.
        """
        check = self.check_values(device)
        with preserved_randomness(device):
            # The processes agree on what may fail by their data before a method waits for all of them.
            step = self._on_inputs.attempt(lambda: self._complete(make_step()))
        if isinstance(step, Exception):
            return self._failed(step, raises=not self._succeeded)
        losses = self._on_losses.attempt(functools.partial(self._losses, step, check))
        if isinstance(losses, Exception):
            return self._failed(losses, raises=not self._succeeded)
        self.failures, self._succeeded = 0, True
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        return losses

    def _complete(self, step: HostStep) -> HostStep:
        """The step with the teacher's scores, if the method needs them, and levels that fit."""
        if self.distillation.needs_scores and self.teacher is not None and step.teacher is not None:
            step.scores = self.teacher.cell_scores(step.teacher)
        self.distillation.check(step)
        return step

    def _losses(self, step: HostStep, check: bool) -> dict[str, Tensor]:
        losses = self.distillation(step)
        if check and not bool(self.distillation.finite):
            raise FloatingPointError(
                "Distillation: the losses must be finite, got NaN or infinity; lower lr or weight, or use bfloat16 in "
                "place of float16"
            )
        return losses

    def _failed(self, error: Exception, *, raises: bool, failures: int = 1) -> dict[str, Tensor]:
        """Counts and warns; returns no losses."""
        if raises:
            raise error
        self.failures += failures
        end = "; the run goes on without distillation" if self.failures >= MAX_FAILURES else "; this batch trains alone"
        text = "".join(traceback.format_exception(error))
        warnings.warn(f"fastkd: the distillation of a batch failed{end}:\n{text}", stacklevel=3)
        error.__traceback__ = None  # its frames hold the tensors of the batch
        return {}

    def try_to_save(self, path: str | os.PathLike) -> None:
        """`save` for a host's callbacks: a file that cannot be written, as on a full disk, is a warning."""
        try:
            self.save(path)
        except (OSError, RuntimeError) as error:  # torch.save raises both
            warnings.warn(f"fastkd: the method's state could not be saved, the run goes on: {error}", stacklevel=2)

    def pyramid_of_teacher(self, images: Tensor, image_sizes: Tensor) -> list[Tensor] | None:
        """The teacher's levels for the student's images; None if the method needs no teacher."""
        if not self.distillation.needs_teacher or self.teacher is None:
            return None
        self.teacher.to(images.device)
        return self.teacher.pyramid(images, image_sizes, self.normalization)

    def step(self) -> None:
        """Updates the method's modules; call it after optimizer.step(). Does nothing after MAX_FAILURES failures.

        Raises: any exception of the first update; a later one is a warning and ends the distillation.
        """
        if self.failures >= MAX_FAILURES:
            return
        error = self._on_update.attempt(self.distillation.step)
        if error is not None:
            self._failed(error, raises=self.distillation.steps <= 1, failures=MAX_FAILURES)

    def detach(self) -> None:
        """Removes all hooks and unfreezes the teacher; the model differs from before only in its trained weights."""
        for handle in self._handles:
            handle.remove()
        for undo in self.on_detach:
            undo()
        self._handles.clear()
        self.on_detach.clear()

    @property
    def state(self) -> State:
        """Progress of the attachment; synchronises the device."""
        kd = self.distillation
        values = {name: float(value) for name, value in self.losses.items()}
        return State(bool(self._handles), kd.steps, kd.computed, self.failures, values)

    def state_dict(self) -> dict[str, Any]:
        """The state for resuming, which the host's checkpoint does not contain."""
        return self.distillation.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        self.distillation.load_state_dict(state)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a separate checkpoint file."""
        self.distillation.save(path)

    def load(self, path: str | os.PathLike) -> None:
        """Restores a file written by `save`."""
        self.distillation.load(path)

    def report(self) -> str:
        """A report on losses and gradients in this host, with warnings."""
        return self.distillation.probe.text(self.distillation, self.teacher, self.normalization, self.failures)
