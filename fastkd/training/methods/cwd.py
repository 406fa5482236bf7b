"""CWD in a run: settings and recipes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastkd.codec import require
from fastkd.distillers import CWD
from fastkd.training.methods.protocol import FeatureMethod, Given


@dataclass(frozen=True)
class CWDConfig(FeatureMethod):
    """Channel-wise distillation: KL divergence between the spatial softmax of each teacher and student channel.

    Args:
        tau: temperature of the softmax over the cells of a channel.
        weight: weight of each level's loss; 10 is published for the COCO recipes.
        final_fraction: last fraction of the run, without distillation.
    """

    kind = "cwd"
    label = "CWD"
    needs_teacher = True

    tau: float = 1.0
    weight: float = dataclasses.field(default=10.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tau > 0, "CWDConfig: tau", "positive", self.tau)

    def build(self, given: Given) -> CWD:
        return CWD(given.student.channels, teacher_channels=given.teacher.channels, tau=self.tau, weight=self.weight)
