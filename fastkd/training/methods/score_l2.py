"""Score-weighted L2 in a run: settings and recipes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastkd.detectors import DetectorConfig
from fastkd.distillers import ScoreL2
from fastkd.training.methods.protocol import FeatureMethod, Given


@dataclass(frozen=True)
class ScoreL2Config(FeatureMethod):
    """Score-weighted L2: squared error between the pyramids, weighted by the teacher's class scores.

    Args:
        weight: weight of each level's loss; 6 is the default of Ultralytics.
        final_fraction: last fraction of the run, without distillation.
    """

    kind = "scorel2"
    label = "Score-weighted L2"
    needs_teacher = True

    weight: float = dataclasses.field(default=6.0, kw_only=True)

    def build(self, given: Given) -> ScoreL2:
        student, teacher = given.student, given.teacher
        levels = len(student.strides)
        return ScoreL2(student.channels, teacher_channels=teacher.channels, levels=levels, weight=self.weight)

    @classmethod
    def unfit(cls, detector: DetectorConfig) -> str | None:
        return None if detector.cells_have_boxes else "whose cells have no scores; take ICD or PKD"
