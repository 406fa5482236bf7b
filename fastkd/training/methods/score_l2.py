"""Score-weighted L2 in a run: settings and recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from fastkd.detectors import DetectorConfig
from fastkd.distillers import ScoreL2
from fastkd.training.doctor.finding import Finding
from fastkd.training.methods.figures import Figures, Log, inside_findings
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

    def teaching_advice(self, log: Log) -> Iterator[Finding]:
        yield from super().teaching_advice(log)
        remedy = "the teacher's scores do not mark the objects; train a better teacher"
        yield from inside_findings(Figures.read(log), "scores", remedy)

    @classmethod
    def unfit(cls, detector: DetectorConfig) -> str | None:
        return None if detector.cells_have_boxes else "whose cells have no scores; take ICD or PKD"
