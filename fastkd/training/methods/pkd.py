"""PKD in a run: settings and recipes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastkd.distillers import PKD
from fastkd.training.methods.protocol import FeatureMethod, Given


@dataclass(frozen=True)
class PKDConfig(FeatureMethod):
    """Distillation by the Pearson correlation: the student's features imitate the teacher's, both standardised.

    Args:
        weight: of each level's loss; the COCO recipes are published with 6, on the four finest levels.
        final_fraction: last part of the run without distillation.
    """

    kind = "pkd"
    label = "PKD"
    needs_teacher = True

    weight: float = dataclasses.field(default=6.0, kw_only=True)

    def build(self, given: Given) -> PKD:
        return PKD(given.student.channels, teacher_channels=given.teacher.channels, weight=self.weight)
