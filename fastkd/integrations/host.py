"""What an attachment to a host's model does in every host: hooks, failures, undo."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.integrations.attachment import Distillation, HostStep
from fastkd.integrations.hooks import Hook, check_plain, claim, release
from fastkd.integrations.teachers import Normalization, Teacher
from fastkd.integrations.traces import preserved_randomness

MAX_FAILURES = 3  # in a row; then the host goes on alone
CHECKED_STEPS = 20  # first steps in which the values of targets are looked at on a GPU, too


@dataclass(frozen=True)
class State:
    """Where an attachment stands.

    Args:
        attached: the hooks are in place.
        steps: updates of the method's modules.
        computed: batches whose losses were computed.
        failures: batches in a row that failed; after the third the host goes on alone.
        losses: detached values of the last batch by name.
    """

    attached: bool
    steps: int
    computed: int
    failures: int
    losses: dict[str, float]


class Attachment:
    """A method attached to a host's model by hooks; `detach` leaves the model as it was.

    A failure of the method after its first batch is a warning, and that batch trains the host alone.

    Args:
        model: the host's plain model.
        distillation: the method.
        teacher: for methods that need one.
        normalization: of the images that the host's model sees.
    """

    def __init__(
        self,
        model: nn.Module,
        distillation: Distillation,
        teacher: Teacher | None = None,
        normalization: Normalization | None = None,
    ):
        check_plain(model)
        if distillation.needs_teacher and teacher is None:
            raise ValueError(
                "attach: this method needs a teacher, got None; pass teacher=<trained detector>, or use method='lgd'"
            )
        self.model: Any = model  # its parts are the host's
        self.distillation, self.teacher = distillation, teacher
        self.normalization = normalization or Normalization()
        self.failures, self._succeeded = 0, False
        self.losses: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self.on_detach: list[Callable[[], None]] = []
        claim(model, self)

    def __deepcopy__(self, memo: dict) -> Attachment:
        return self

    def hook(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """A forward hook until `detach`."""
        self._handles.append(module.register_forward_hook(Hook(torch.compiler.disable(function))))

    def pre_hook(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """A forward hook before the module runs, until `detach`: function(module, args, kwargs)."""
        hook = Hook(torch.compiler.disable(function))
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    @property
    def active(self) -> bool:
        """Whether this forward pass trains: train mode, gradients, and the method is not given up."""
        return self.model.training and torch.is_grad_enabled() and self.failures < MAX_FAILURES

    def check_values(self, device: torch.device) -> bool:
        """Whether this batch's targets are looked at: always on a CPU, in the first batches elsewhere."""
        return device.type == "cpu" or self.distillation.computed < CHECKED_STEPS

    def distil(self, device: torch.device, make_step: Callable[[], HostStep]) -> dict[str, Tensor]:
        """The losses of a batch, or none if the method fails.

        Raises: whatever goes wrong in the first batch, as then nothing of the host's run is lost.
        """
        try:
            with preserved_randomness(device):
                losses = self.distillation(make_step())
        except Exception:
            if not self._succeeded:
                raise
            self._failed()
            return {}
        self.failures, self._succeeded = 0, True
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        return losses

    def _failed(self) -> None:
        self.failures += 1
        end = "; the run goes on without distillation" if self.failures >= MAX_FAILURES else "; this batch trains alone"
        warnings.warn(f"fastkd: the distillation of a batch failed{end}:\n{traceback.format_exc()}", stacklevel=3)

    def pyramid_of_teacher(self, images: Tensor, image_sizes: Tensor) -> list[Tensor] | None:
        """The teacher's levels of the student's images, None if the method needs none."""
        if not self.distillation.needs_teacher or self.teacher is None:
            return None
        self.teacher.to(images.device)
        return self.teacher.pyramid(images, image_sizes, self.normalization)

    def step(self) -> None:
        """Updates the method's modules; call it after optimizer.step()."""
        self.distillation.step()

    def detach(self) -> None:
        """Removes all hooks; the model is as it was before attaching, apart from what it learned."""
        for handle in self._handles:
            handle.remove()
        for undo in self.on_detach:
            undo()
        self._handles.clear()
        self.on_detach.clear()
        release(self.model)

    @property
    def state(self) -> State:
        """Where the attachment stands; waits for the device."""
        kd = self.distillation
        values = {name: float(value) for name, value in self.losses.items()}
        return State(bool(self._handles), kd.steps, kd.computed, self.failures, values)

    def state_dict(self) -> dict[str, Any]:
        """To resume; the host's checkpoint does not hold it."""
        return self.distillation.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.distillation.load_state_dict(state)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a checkpoint file of its own."""
        self.distillation.save(path)

    def load(self, path: str | os.PathLike) -> None:
        """Continues from a file of `save`."""
        self.distillation.load(path)

    def report(self) -> str:
        """What the losses do in this host, with a sentence on what looks wrong."""
        return self.distillation.probe.text(self.distillation, self.teacher, self.normalization, self.failures)
