"""Settings of an optimiser, for the student and for methods with a separate optimiser."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fastkd.codec import require, require_fraction


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser and its learning rate schedule.

    Args:
        kind: "sgd" or "adamw".
        learning_rate: rate after warm-up, for the whole batch.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD (in the gradient) or AdamW (decoupled).
        decay_norm_and_bias: apply weight decay to biases and normalisation parameters (all 1-D parameters) as well.
        clip_norm: maximum norm of all gradients of this optimiser; None does not clip.
        decay: "multistep" multiplies the rate by `gamma` at each milestone; "cosine" decays it to 0 at the end.
        milestones: fractions of the run, ascending.
        gamma: factor at a milestone.
        warmup: fraction of the run over which the rate rises linearly.
        warmup_factor: rate at the start of the warm-up, as a factor of `learning_rate`.
    """

    kind: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = False
    clip_norm: float | None = None
    decay: Literal["multistep", "cosine"] = "multistep"
    milestones: tuple[float, ...] = (6 / 9, 8 / 9)
    gamma: float = 0.1
    warmup: float = 1 / 90
    warmup_factor: float = 1e-3

    def __post_init__(self) -> None:
        require(self.kind in ("sgd", "adamw"), "OptimizerConfig: kind", "'sgd' or 'adamw'", self.kind)
        require(self.decay in ("multistep", "cosine"), "OptimizerConfig: decay", "'multistep' or 'cosine'", self.decay)
        require(self.learning_rate > 0, "OptimizerConfig: learning_rate", "positive", self.learning_rate)
        require(0 <= self.momentum < 1, "OptimizerConfig: momentum", "in [0, 1)", self.momentum)
        require(self.weight_decay >= 0, "OptimizerConfig: weight_decay", "0 or more", self.weight_decay)
        require(0 < self.gamma <= 1, "OptimizerConfig: gamma", "in (0, 1]", self.gamma)
        require(0 < self.warmup_factor <= 1, "OptimizerConfig: warmup_factor", "in (0, 1]", self.warmup_factor)
        clip = self.clip_norm
        require(clip is None or clip > 0, "OptimizerConfig: clip_norm", "positive or None", clip)
        require_fraction(self, "warmup")
        ordered = sorted(set(self.milestones))
        require(
            list(self.milestones) == ordered and all(0 < m <= 1 for m in ordered),
            "OptimizerConfig: milestones",
            "ascending fractions of the run in (0, 1]",
            self.milestones,
        )

    def scaled(self, factor: float) -> OptimizerConfig:
        """A copy with the learning rate multiplied by `factor`."""
        return dataclasses.replace(self, learning_rate=self.learning_rate * factor)
