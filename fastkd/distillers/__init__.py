"""The three methods as ordinary modules: pyramids and a Batch in, losses out; no detector, dataset or config."""

from fastkd.distillers.fgfi import FGFI
from fastkd.distillers.icd import ICD
from fastkd.distillers.lgd import LGD

__all__ = ["FGFI", "ICD", "LGD"]
