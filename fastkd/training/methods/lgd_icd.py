"""LGD and ICD on one student. Other combinations are further subclasses of Combined."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastkd.training.methods.icd import ICDConfig
from fastkd.training.methods.lgd import LGDConfig
from fastkd.training.methods.protocol import Combined
from fastkd.training.optimizer_config import OptimizerConfig


@dataclass(frozen=True)
class LGDICDConfig(Combined):
    """LGD and ICD on one student.

    Args:
        lgd: settings of LGD.
        icd: settings of ICD.
        lgd_optimizer: optimiser of LGD's parameters; None uses the student's. ICD's parameters use the recipe's
            `method_optimizer`.
    """

    kind = "lgd-icd"
    label = "LGD + ICD"
    needs_teacher = True
    needs_priors = True

    lgd: LGDConfig = field(default_factory=LGDConfig)
    icd: ICDConfig = field(default_factory=ICDConfig)
    lgd_optimizer: OptimizerConfig | None = None
