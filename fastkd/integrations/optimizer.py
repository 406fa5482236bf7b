"""The optimiser of the method's modules, stepped after the host's."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from fastkd.integrations.gradients import GradientRecord
from fastkd.ops._support.normalizer import is_distributed

PUBLISHED_RATE, PUBLISHED_STEPS = 1e-4, 90_000  # of ICD's modules
MOST_RATE = 1e-3  # above it the attention saturates on a few cells (docs/results/findings.md)


def rate_for(total_steps: int | None) -> float:
    """Learning rate of AdamW for a run of so many steps: the published one, more in shorter runs.

    AdamW moves a weight by about its rate a step, so that at the published rate the projections between teacher and
    student hardly leave their random start in some hundred steps. Noise averages over steps, hence the square root.
    """
    if total_steps is None:
        return PUBLISHED_RATE
    return min(MOST_RATE, PUBLISHED_RATE * max(1.0, (PUBLISHED_STEPS / total_steps) ** 0.5))


class MethodOptimizer:
    """AdamW with clipping and cosine decay over the host's run.

    Gradients are divided by the factors with which the host multiplied the losses, so that clipping is the same in
    every host, and averaged over the processes of a distributed run. Gradients that are not finite count as zero.

    Args:
        parameters: parameters of the method's modules.
        record: of the backward passes through the losses.
        lr, weight_decay: settings of AdamW.
        clip: maximum norm of all gradients together.

    Attributes:
        without_gradient: indices of the parameters that had no gradient in the last step.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        record: GradientRecord,
        *,
        lr: float,
        weight_decay: float,
        clip: float,
    ):
        self.record = record
        self.without_gradient: list[int] = []
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.lr, self.clip = lr, clip
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=weight_decay) if self.parameters else None

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Divides gradients by the host's factors and averages them over processes; missing gradients are zero."""
        scale = self.record.factor()
        if not self.parameters or scale is None:
            return
        self.without_gradient = [index for index, parameter in enumerate(self.parameters) if parameter.grad is None]
        flat = torch.cat(
            [
                (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
                for parameter in self.parameters
            ]
        )
        flat /= torch.where(scale > 0, scale, 1.0).to(flat)  # before averaging: each process has its own factor
        if is_distributed():
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        finite = torch.linalg.vector_norm(flat).isfinite()
        flat = torch.where(finite, flat, 0.0)
        self.record.count(finite)
        for parameter, grad in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)

    def step(self, fraction: float) -> None:
        """One update with the learning rate at `fraction` of the run; does nothing without gradients."""
        if self.adamw is not None and (is_distributed() or any(p.grad is not None for p in self.parameters)):
            self._update(self.adamw, fraction)
        self.record.next_step()

    def _update(self, adamw: torch.optim.AdamW, fraction: float) -> None:
        self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for group in adamw.param_groups:
            group["lr"] = self.lr * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0))) / 2
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, object]:
        """The state for resuming."""
        return {} if self.adamw is None else self.adamw.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restores the result of `state_dict`."""
        if self.adamw is not None:
            self.adamw.load_state_dict(state)
