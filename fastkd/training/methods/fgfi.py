"""FGFI in a run: settings, phases, recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from fastkd.codec import require, require_fraction
from fastkd.detectors import DetectorConfig
from fastkd.distillers import FGFI
from fastkd.training.doctor.finding import Finding
from fastkd.training.methods.figures import Figures, Log, inside_findings
from fastkd.training.methods.phase import Phase, steps_of
from fastkd.training.methods.protocol import FeatureMethod, Given, Setup


@dataclass(frozen=True)
class FGFIConfig(FeatureMethod):
    """Fine-grained feature imitation: the student's features imitate the teacher's near objects.

    Args:
        psi: a cell imitates if one of its anchors has an IoU above psi times the object's best IoU with any anchor.
        warmup_fraction: first fraction of the run, without imitation.
        weight: weight of the imitation loss.
        final_fraction: last fraction of the run, without imitation.
    """

    kind = "fgfi"
    label = "FGFI"
    needs_teacher = True
    pays = "pays in short runs, too, where a good teacher has the student's pyramid."

    psi: float = 0.5
    warmup_fraction: float = 1 / 90
    weight: float = dataclasses.field(default=0.01, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.psi <= 1, "FGFIConfig: psi", "in [0, 1]", self.psi)
        require_fraction(self, "warmup_fraction")

    def build(self, given: Given) -> FGFI:
        anchors, channels = given.student.imitation_anchors(), given.student.channels
        return FGFI(anchors, channels, teacher_channels=given.teacher.channels, psi=self.psi, weight=self.weight)

    def phase(self, step: int, steps: int, *, pretrained: bool) -> Phase:
        distill = super().phase(step, steps, pretrained=pretrained).distill
        return Phase(distill=distill and step >= steps_of(self.warmup_fraction, steps))

    def teaching_advice(self, log: Log) -> Iterator[Finding]:
        yield from super().teaching_advice(log)
        remedy = "raise --method.psi, or choose anchors of the size of the boxes (--detector.anchor-base)"
        yield from inside_findings(Figures.read(log), "imitation cells", remedy)

    @classmethod
    def unfit(cls, detector: DetectorConfig) -> str | None:
        return None if detector.cells_have_boxes else "whose cells have no boxes; take ICD or LGD"

    @classmethod
    def on_scenes(cls, detector: DetectorConfig) -> Setup:
        """A smaller weight than published, because the squared error is not normalised.

        With the narrow pyramids of the scenes recipes the squared difference, summed over channels, is about 10^4 per
        cell: with weight 0.01 the loss starts at 50, the detector's at 1.7.
        """
        return Setup(cls(weight=2e-4))
