"""The optimiser of the method's modules, stepped after the host's."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

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


class _Scale(torch.autograd.Function):
    """Identity that records the gradient of a loss, the factor by which the host multiplied it."""

    @staticmethod
    def forward(ctx, loss: Tensor, record: Tensor) -> Tensor:
        ctx.record = record
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.record.add_(grad.abs().to(ctx.record))
        return grad, None


class MethodOptimizer:
    """AdamW with clipping and cosine decay over the host's run.

    Gradients are averaged over the processes of a distributed run. They are divided by the factors with which the host
    multiplied the losses (a GradScaler's, 1 / accumulated batches), so that clipping is the same in every host.
    Gradients that are not finite count as zero.

    Args:
        parameters: parameters of the method's modules.
        lr, weight_decay: settings of AdamW.
        clip: maximum norm of all gradients together.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, clip: float):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.lr, self.clip = lr, clip
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=weight_decay) if self.parameters else None
        self.scales: dict[str, Tensor] = {}

    def watch(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the losses; their factors are recorded in the host's backward pass."""
        watched = {}
        for name, loss in losses.items():
            if name not in self.scales:
                self.scales[name] = torch.zeros((), device=loss.device)
            watched[name] = _Scale.apply(loss, self.scales[name]) if loss.requires_grad else loss
        return watched

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Averages gradients over processes and divides by the host's factors; missing gradients are zero."""
        if not self.parameters or not self.scales:
            return
        flat = torch.cat(
            [
                (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
                for parameter in self.parameters
            ]
        )
        if _distributed():
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        scale = torch.stack(list(self.scales.values())).amax()
        flat /= torch.where(scale > 0, scale, 1.0).to(flat)
        norm = torch.linalg.vector_norm(flat)
        flat = torch.where(norm.isfinite(), flat, 0.0)
        for parameter, grad in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)
        for value in self.scales.values():
            value.zero_()

    def step(self, fraction: float) -> None:
        """One update with the learning rate at `fraction` of the run; does nothing without gradients."""
        if self.adamw is None:
            return
        if all(parameter.grad is None for parameter in self.parameters) and not _distributed():
            return
        self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0))) / 2
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, object]:
        """The state for resuming."""
        return {} if self.adamw is None else self.adamw.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restores the result of `state_dict`."""
        if self.adamw is not None:
            self.adamw.load_state_dict(state)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
