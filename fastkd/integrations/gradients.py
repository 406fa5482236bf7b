"""Gradients on their way from the host's losses to the method, and from the method to the host."""

from __future__ import annotations

import torch
from torch import Tensor

SCALED = 256.0  # a factor on a loss that only a GradScaler reaches


class GradientRecord:
    """Record of the backward passes since the last step: factors on the losses, and gradients that were not finite.

    Attributes:
        factors: for each loss the sum of the factors with which the host multiplied it: a GradScaler's, 1 / accumulated
            batches.
        zeroed: [] bool, whether a gradient was not finite and counted as zero; None before the first.
        zeroed_steps: [] integer, number of earlier steps with such gradients.
    """

    def __init__(self) -> None:
        self.factors: dict[str, Tensor] = {}
        self.zeroed: Tensor | None = None
        self.zeroed_steps: Tensor | int = 0

    def watch(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the losses; their factors are recorded in the host's backward pass."""
        watched = {}
        for name, loss in losses.items():
            if name not in self.factors:
                self.factors[name] = torch.zeros((), device=loss.device)
            watched[name] = _Factor.apply(loss, self.factors[name]) if loss.requires_grad else loss
        return watched

    def factor(self) -> Tensor | None:
        """[] float32, the largest factor; None before the first loss."""
        return torch.stack(list(self.factors.values())).amax() if self.factors else None

    def count(self, finite: Tensor) -> None:
        """Notes whether a gradient was finite, [] bool."""
        self.zeroed = ~finite if self.zeroed is None else self.zeroed | ~finite

    def next_step(self) -> None:
        """Begins the next step."""
        if self.zeroed is not None:
            self.zeroed_steps = self.zeroed_steps + self.zeroed.long()
        self.zeroed = None
        for factor in self.factors.values():
            factor.zero_()


class _Factor(torch.autograd.Function):
    """Identity that records the gradient of a loss, the factor by which the host multiplied it."""

    @staticmethod
    def forward(ctx, loss: Tensor, record: Tensor) -> Tensor:
        ctx.record = record
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.record.add_(grad.abs().to(ctx.record))
        return grad, None


class FiniteGradient(torch.autograd.Function):
    """Identity whose gradient is zero where it is not finite, so that a failed method cannot spoil the host.

    A float16 gradient may overflow only because a GradScaler scales it. The scaler must see that to lower its scale, or
    the distillation stays off. It is sure to be there if the forward pass ran in float16 autocast and the loss was
    multiplied by more than SCALED; then the host skips its step, as after an overflow of its own. Gradients that stay
    infinite at any scale cost the host only these skipped steps: below SCALED they are zero again.
    """

    @staticmethod
    def forward(ctx, level: Tensor, record: GradientRecord) -> Tensor:
        kind = level.device.type
        ctx.scaled = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        ctx.record = record
        return level.view_as(level)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        kept, factor = grad.isfinite().all(), ctx.record.factor() if ctx.scaled else None
        if factor is not None:
            kept = kept | (factor > SCALED)
        ctx.record.count(kept)
        return torch.where(kept, grad, 0.0), None
