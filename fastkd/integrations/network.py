"""The trained modules of a distillation in a host: the method and its projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd.distillers.protocol import Distilled, Distiller
from fastkd.integrations.gradients import FiniteGradient, GradientRecord
from fastkd.integrations.methods import LevelwiseICD
from fastkd.integrations.pyramids import Projections, PyramidSpec, resample, widen
from fastkd.types import Batch


class MethodNetwork(nn.Module):
    """The method, projections of the student to its width, and projections of an instructive pyramid back.

    Args:
        method: the distiller.
        spec: widths and matching of the pyramids.
    """

    def __init__(self, method: Distiller, spec: PyramidSpec):
        super().__init__()
        self.method, self.spec, self.record = method, spec, GradientRecord()
        widths = spec.student_widths
        channels = getattr(method, "channels", None) or max(spec.teacher_widths or widths)
        self.to_method = Projections(widths, [channels] * len(widths))
        self.to_host = None if method.needs_teacher else Projections([channels] * len(widths), widths)
        self.same_width = not isinstance(method, LevelwiseICD)

    def forward(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None,
        *,
        detach_student: bool,
        scores: Sequence[Tensor] | None = None,
    ) -> Distilled:
        """The method's losses; an instructive pyramid has the host's widths.

        Args:
            student: the host's levels [B, C_l, H_l, W_l]; receive gradients.
            batch: as in `Distiller.forward`.
            teacher: the teacher's levels, without gradient; None if the method needs no teacher.
            detach_student: as in `Distiller.forward`.
            scores: class scores of the teacher's cells, for methods that need them.
        """
        dtype = self._dtype(student[0])
        levels = [FiniteGradient.apply(student[mine], self.record) for mine, _ in self.spec.pairs]
        levels = self.to_method([level.to(dtype) for level in levels])
        guides = None
        if self.method.needs_teacher:
            chosen = [(teacher or [])[theirs].detach().to(dtype) for _, theirs in self.spec.pairs]
            guides = resample(chosen, levels)
            if self.same_width:  # levels of different widths are padded with zero channels
                guides = widen(guides, max(self.spec.teacher_widths))
        options = {}
        if self.method.needs_scores:
            if scores is None:
                raise ValueError(
                    f"Distillation: {type(self.method).__name__} needs HostStep.scores, got None; give the teacher's "
                    "highest class probabilities, or use another method"
                )
            options["scores"] = resample([scores[theirs] for _, theirs in self.spec.pairs], levels)
        distilled = self.method(levels, batch, guides, detach_student=detach_student, **options)
        if distilled.instructive is not None and self.to_host is not None:
            distilled.instructive = self.to_host(distilled.instructive)
        return distilled

    def _dtype(self, level: Tensor) -> torch.dtype:
        """The dtype of the method's weights; under autocast that of the level."""
        if torch.is_autocast_enabled(level.device.type):
            return level.dtype
        return next((parameter.dtype for parameter in self.parameters()), level.dtype)
