"""CWD, channel-wise distillation: match each channel's distribution over the cells (Shu et al., ICCV 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.distillers.checks import check_pyramids
from fastkd.distillers.protocol import Distilled, Distiller, Ratio
from fastkd.ops._support.coverage import widen
from fastkd.types import Batch


class CWD(Distiller):
    """Channel-wise distillation.

    p(x) = softmax over the cells of x / tau, for each image and channel;
    loss = weight * sum over levels of tau^2 / (C * B) * sum over images and channels of KL(p(teacher) || p(student)).

    Args:
        channels: of the student's pyramid.
        teacher_channels: of the teacher's pyramid; None = as the student's. Where they differ, a 1x1 convolution shared
            by all levels adapts the student.
        tau: temperature.
        weight: factor on the loss of each level (published for the pyramids of RetinaNet and Faster R-CNN: 10).
    Source: methods 7.
    """

    needs_teacher = True

    def __init__(
        self, channels: int = 256, *, teacher_channels: int | None = None, tau: float = 1.0, weight: float = 10.0
    ):
        super().__init__()
        if not tau > 0:
            raise ValueError(f"CWD: tau must be > 0, got {tau}; 1 is the published value")
        if weight < 0:
            raise ValueError(f"CWD: weight must be at least 0, got {weight}; 10 is the published value")
        self.channels, self.tau, self.weight = channels, tau, weight
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
        """The divergence of a batch.

        Args:
            student: L tensors [B, channels, H_l, W_l]; receive gradients.
            batch: unused.
            teacher: L tensors [B, teacher_channels, H_l, W_l]; frozen.
            detach_student: no gradient into the student's features (the adapter still learns).
            prepared: unused.
        Returns: losses "cwd_distill".
        Raises: ValueError or TypeError if the pyramids disagree.
        """
        teacher = check_pyramids("CWD", student, teacher, self.channels, self.teacher_channels)
        student = [level.detach() for level in student] if detach_student else student
        pairs = zip(student, teacher, strict=True)
        losses = [self._divergence(self._log_p(self.adapter(level)), self._log_p(target)) for level, target in pairs]
        return Distilled({"cwd_distill": self.weight * torch.stack(losses).sum()})

    def diagnostics(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        *,
        prepared: Any = None,
        scores: Any = None,
    ) -> dict[str, Ratio]:
        """Imitation error: the divergence relative to that of a student whose distributions are uniform."""
        teacher = check_pyramids("CWD", student, teacher, self.channels, self.teacher_channels)
        errors, of_uniform = [], []
        for level, target in zip(student, teacher, strict=True):
            log_p = self._log_p(target)
            errors.append(self._divergence(self._log_p(self.adapter(level)), log_p))
            of_uniform.append(self._divergence(torch.full_like(log_p, -math.log(log_p.shape[2])), log_p))
        return {"imitation_error": (torch.stack(errors).sum(), torch.stack(of_uniform).sum())}

    def _divergence(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """tau^2 * KL(p || q), averaged over images and channels, of [B, C, H * W]; no gradient to p."""
        divergence = F.kl_div(log_q, log_p.detach(), reduction="sum", log_target=True)
        return divergence * (self.tau**2 / (log_p.shape[0] * log_p.shape[1]))

    def _log_p(self, level: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H * W], at least float32."""
        return F.log_softmax(widen(level).flatten(2) / self.tau, dim=2)
