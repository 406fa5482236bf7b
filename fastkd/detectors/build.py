"""Builds a detector from its configuration."""

from __future__ import annotations

from collections.abc import Callable

from fastkd.detectors.atss import ATSS
from fastkd.detectors.common.two_stage import TwoStage
from fastkd.detectors.condinst import CondInst
from fastkd.detectors.config import DetectorConfig
from fastkd.detectors.fcos import FCOS
from fastkd.detectors.own import build_own
from fastkd.detectors.poto import POTO
from fastkd.detectors.protocol import Detector
from fastkd.detectors.retinanet import RetinaNet
from fastkd.detectors.solov2 import SOLOv2

_DETECTORS: dict[str, Callable[[DetectorConfig], Detector]] = {
    "retinanet": RetinaNet,
    "fcos": FCOS,
    "atss": ATSS,
    "poto": POTO,
    "condinst": CondInst,
    "solov2": SOLOv2,
    "faster_rcnn": TwoStage,
    "mask_rcnn": TwoStage,
}


def build_detector(config: DetectorConfig) -> Detector:
    """The detector that `config` describes, with random weights from torch's global generator.

    Raises: TypeError if config is not a DetectorConfig; ValueError if it names a class of one's own that is not in use
        (see `use_detector`) or does not fit.
    """
    if not isinstance(config, DetectorConfig):
        raise TypeError(f"build_detector: config must be a DetectorConfig, got {type(config).__name__}")
    if config.custom is not None:
        return build_own(config)
    return _DETECTORS[config.detector](config)
