"""Distillation methods as modules: pyramids and a Batch in, losses out; independent of detector and data."""

from fastkd.distillers.cwd import CWD
from fastkd.distillers.fgfi import FGFI
from fastkd.distillers.icd import ICD
from fastkd.distillers.lgd import LGD
from fastkd.distillers.pkd import PKD
from fastkd.distillers.protocol import Distilled, Distiller
from fastkd.distillers.score_l2 import ScoreL2

__all__ = ["CWD", "FGFI", "ICD", "LGD", "PKD", "Distilled", "Distiller", "ScoreL2"]
