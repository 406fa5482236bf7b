"""Score-weighted L2: imitation of the teacher's features, weighted by the teacher's class scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.distillers.checks import check_pyramids
from fastkd.distillers.diagnostics import share_inside_boxes
from fastkd.distillers.protocol import Distilled, Distiller, Ratio
from fastkd.ops._support.checks import check_levels, check_same_sizes
from fastkd.ops._support.coverage import widen
from fastkd.ops._support.normalizer import global_mean
from fastkd.types import Batch


class ScoreL2(Distiller):
    """Score-weighted L2.

    loss = weight * sum over levels of [sum over images, channels, cells of score * (adapt_l(student) - teacher)^2]
    / (C * sum of the scores + 1e-9); adapt_l = conv1x1, ReLU, conv1x1, one for each level.

    Args:
        channels: of the student's pyramid.
        teacher_channels: C, of the teacher's pyramid; None = as the student's.
        levels: number of pyramid levels.
        weight: factor on the loss of each level; Ultralytics' default is 6.
    Source: methods 8.
    """

    needs_teacher = True
    needs_scores = True

    def __init__(
        self, channels: int = 256, *, teacher_channels: int | None = None, levels: int = 5, weight: float = 6.0
    ):
        super().__init__()
        if levels < 1:
            raise ValueError(f"ScoreL2: levels must be at least 1, got {levels}; count the pyramid's levels")
        if weight < 0:
            raise ValueError(f"ScoreL2: weight must be at least 0, got {weight}; 6 is what Ultralytics ships")
        self.channels, self.weight = channels, weight
        self.teacher_channels = target = channels if teacher_channels is None else teacher_channels
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, target, 1), nn.ReLU(inplace=True), nn.Conv2d(target, target, 1))
            for _ in range(levels)
        )

    def forward(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        detach_student: bool = False,
        prepared: Any = None,
        scores: Sequence[Tensor] | None = None,
    ) -> Distilled:
        """The imitation loss of a batch.

        Args:
            student: L tensors [B, channels, H_l, W_l]; receive gradients.
            batch: unused.
            teacher: L tensors [B, teacher_channels, H_l, W_l]; frozen.
            detach_student: no gradient into the student's features (the adapters still learn).
            prepared: unused.
            scores: L tensors [B, 1, H_l, W_l] in [0, 1], the teacher's highest class probability in each cell.
        Returns: losses "scorel2_distill"; 0 where all scores are 0.
        Raises: ValueError or TypeError if the pyramids or scores disagree.
        """
        teacher, scores = self._checked(student, teacher, scores)
        losses = []
        for adapter, level, target, score in zip(self.adapters, student, teacher, scores, strict=True):
            error = _weighted_square(adapter(level.detach() if detach_student else level), target, score)
            score_sum = widen(score.detach()).sum()
            losses.append(error / (global_mean(score_sum) * self.teacher_channels + 1e-9))
        return Distilled({"scorel2_distill": self.weight * torch.stack(losses).sum()})

    def diagnostics(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        prepared: Any = None,
        scores: Sequence[Tensor] | None = None,
    ) -> dict[str, Ratio]:
        """Imitation error, relative to the teacher's features, and the share of the scores inside the boxes."""
        teacher, scores = self._checked(student, teacher, scores)
        levels = list(zip(self.adapters, student, teacher, scores, strict=True))
        errors = [_weighted_square(adapter(level), target, score) for adapter, level, target, score in levels]
        sizes = [_weighted_square(torch.zeros_like(target), target, score) for _, _, target, score in levels]
        inside = share_inside_boxes([score[:, 0] for score in scores], batch)
        return {"imitation_error": (torch.stack(errors).sum(), torch.stack(sizes).sum()), **inside}

    def _checked(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor] | None, scores: Sequence[Tensor] | None
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Teacher and scores. Raises: ValueError or TypeError if the pyramids or scores disagree."""
        teacher = check_pyramids("ScoreL2", student, teacher, self.channels, self.teacher_channels)
        if scores is None:
            raise ValueError("ScoreL2: scores must be given, got None; pass those of the frozen teacher")
        check_levels("ScoreL2", "scores", scores, channels=1)
        check_same_sizes("ScoreL2", "scores", scores, "student", student)
        if len(student) != len(self.adapters):
            raise ValueError(
                f"ScoreL2: student must have {len(self.adapters)} levels, got {len(student)}; build with levels="
            )
        return teacher, scores


def _weighted_square(adapted: Tensor, target: Tensor, score: Tensor) -> Tensor:
    """Sum of score * (adapted - target)^2 over [B, C, H_l, W_l]; no gradient to target and score [B, 1, H_l, W_l]."""
    error = (widen(adapted) - widen(target.detach())).square().sum(1, keepdim=True)  # [B, 1, H_l, W_l]
    return (error * widen(score.detach())).sum()
