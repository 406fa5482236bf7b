"""PKD: the student imitates the teacher's features, both standardised (Cao et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.distillers.checks import check_pyramids
from fastkd.distillers.protocol import Distilled, Distiller, Ratio
from fastkd.ops._support.coverage import widen
from fastkd.types import Batch

EPS = 1e-6


def standardise(level: Tensor) -> Tensor:
    """[B, C, H, W] -> (level - mean) / (std + 1e-6), both over images and cells of each channel; at least float32."""
    level = widen(level)
    cells = level.shape[0] * level.shape[2] * level.shape[3]
    std, mean = torch.std_mean(level, dim=(0, 2, 3), correction=min(1, cells - 1), keepdim=True)
    return (level - mean) / (std + EPS)


class PKD(Distiller):
    """Distillation by the Pearson correlation of features, which is invariant to their scale and offset.

    loss = weight * sum over levels of 1/2 * mean over images, channels and cells of (s - t)^2, with s and t the
    standardised student and teacher; this is 1 minus their correlation, averaged over channels. Statistics are taken
    over the images of this process.

    Args:
        channels: of the student's pyramid.
        teacher_channels: of the teacher's pyramid; None = as the student's. Where they differ, a 1x1 convolution shared
            by all levels adapts the student.
        weight: factor on the loss of each level (published: 6, on the four finest levels).
    Source: methods 6.
    """

    needs_teacher = True

    def __init__(self, channels: int = 256, *, teacher_channels: int | None = None, weight: float = 6.0):
        super().__init__()
        if weight < 0:
            raise ValueError(f"PKD: weight must be at least 0, got {weight}; 6 is the published value")
        self.channels, self.weight = channels, weight
        self.teacher_channels = channels if teacher_channels is None else teacher_channels
        same = self.teacher_channels == channels
        self.adapter = nn.Identity() if same else nn.Conv2d(channels, self.teacher_channels, 1)

    def forward(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        detach_student: bool = False,
        prepared: Any = None,
    ) -> Distilled:
        """The imitation loss of a batch.

        Args:
            student: L tensors [B, channels, H_l, W_l]; receive gradients.
            batch: unused.
            teacher: L tensors [B, teacher_channels, H_l, W_l]; frozen.
            detach_student: no gradient into the student's features (the adapter still learns).
            prepared: unused.
        Returns: losses "pkd_distill".
        Raises: ValueError or TypeError if the pyramids disagree.
        """
        student = [level.detach() for level in student] if detach_student else student
        return Distilled({"pkd_distill": self.weight * self._level_losses(student, teacher).sum()})

    def diagnostics(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        prepared: Any = None,
        scores: Any = None,
    ) -> dict[str, Ratio]:
        """Imitation error: the unweighted loss of a level, 1 minus the correlation, averaged over the levels."""
        losses = self._level_losses(student, teacher)
        return {"imitation_error": (losses.sum(), torch.full_like(losses[0], len(losses)))}

    def _level_losses(self, student: Sequence[Tensor], teacher: Sequence[Tensor] | None) -> Tensor:
        """The unweighted loss of each level, [L]."""
        teacher = check_pyramids("PKD", student, teacher, self.channels, self.teacher_channels)
        pairs = zip(student, teacher, strict=True)
        errors = [F.mse_loss(standardise(self.adapter(level)), standardise(target.detach())) for level, target in pairs]
        return torch.stack(errors) / 2
