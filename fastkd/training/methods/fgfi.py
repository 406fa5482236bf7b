"""FGFI in a run: settings, phases, recipes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastkd.codec import require, require_fraction
from fastkd.detectors import DetectorConfig
from fastkd.distillers import FGFI
from fastkd.training.methods.phase import Phase, steps_of
from fastkd.training.methods.protocol import FeatureMethod, Given, Setup


@dataclass(frozen=True)
class FGFIConfig(FeatureMethod):
    """Fine-grained feature imitation: the student's features imitate the teacher's near objects.

    Args:
        psi: share of the largest IoU an anchor must exceed for its cell to imitate.
        warmup_fraction: first part of the run without imitation.
        weight: of the imitation loss.
        final_fraction: last part of the run without imitation.
    """

    kind = "fgfi"
    label = "FGFI"
    needs_teacher = True

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

    @classmethod
    def unfit(cls, detector: DetectorConfig) -> str | None:
        return None if detector.cells_have_boxes else "whose cells have no boxes; take ICD or LGD"

    @classmethod
    def on_scenes(cls, detector: DetectorConfig) -> Setup:
        """A smaller weight: the error is not normalised.

        The cells of our narrow teacher differ from the student's by some 10^4 (squared, summed over channels): at 0.01
        the loss starts at 50 and drowns the detector's 1.7.
        """
        return Setup(cls(weight=2e-4))
