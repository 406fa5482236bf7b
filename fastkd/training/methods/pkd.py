"""PKD in a run: settings and recipes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastkd.distillers import PKD
from fastkd.training.methods.protocol import FeatureMethod, Given


@dataclass(frozen=True)
class PKDConfig(FeatureMethod):
    """PKD, distillation via Pearson correlation: squared error between the standardised features of both pyramids.

    Args:
        weight: weight of each level's loss; published for COCO is 6, on the four finest levels.
        final_fraction: last fraction of the run, without distillation.
    """

    kind = "pkd"
    label = "PKD"
    needs_teacher = True

    weight: float = dataclasses.field(default=6.0, kw_only=True)

    def build(self, given: Given) -> PKD:
        return PKD(given.student.channels, teacher_channels=given.teacher.channels, weight=self.weight)
