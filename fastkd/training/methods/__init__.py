"""The distillation methods of the named recipes, one file each."""

from fastkd.training.methods.cwd import CWDConfig
from fastkd.training.methods.fgfi import FGFIConfig
from fastkd.training.methods.icd import ICDConfig
from fastkd.training.methods.lgd import LGDConfig
from fastkd.training.methods.lgd_icd import LGDICDConfig
from fastkd.training.methods.phase import Phase
from fastkd.training.methods.pkd import PKDConfig
from fastkd.training.methods.protocol import Combined, FeatureMethod, Given, Method, Setup, kinds
from fastkd.training.methods.score_l2 import ScoreL2Config

# Each has recipes for every detector it supports: scenes-<detector>-<kind> and coco-<detector>-<kind>.
WITH_RECIPES: tuple[type[Method], ...] = (LGDConfig, ICDConfig, FGFIConfig, PKDConfig, CWDConfig, ScoreL2Config)

__all__ = [
    "WITH_RECIPES",
    "CWDConfig",
    "Combined",
    "FGFIConfig",
    "FeatureMethod",
    "Given",
    "ICDConfig",
    "LGDConfig",
    "LGDICDConfig",
    "Method",
    "PKDConfig",
    "Phase",
    "ScoreL2Config",
    "Setup",
    "kinds",
]
