"""The three methods as ordinary modules: pyramids and a Batch in, losses out. They know no detector, no dataset, no config."""

from fastkd.distillers.fgfi import FGFI
from fastkd.distillers.icd import ICD
from fastkd.distillers.lgd import LGD

__all__ = ["FGFI", "ICD", "LGD"]
