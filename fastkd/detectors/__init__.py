"""Detectors on torchvision's parts behind one protocol: features, loss, detect, parts."""

from fastkd.detectors.atss import ATSS
from fastkd.detectors.build import build_detector
from fastkd.detectors.common.two_stage import TwoStage
from fastkd.detectors.condinst import CondInst
from fastkd.detectors.config import DetectorConfig
from fastkd.detectors.fcos import FCOS
from fastkd.detectors.own import use_detector
from fastkd.detectors.poto import POTO
from fastkd.detectors.protocol import Detector
from fastkd.detectors.retinanet import RetinaNet
from fastkd.detectors.solov2 import SOLOv2
from fastkd.detectors.weights.convert import Conversion, convert_checkpoint
from fastkd.detectors.weights.files import (
    MatchReport,
    check_teacher,
    inherit,
    load_backbone_weights,
    load_detector,
    save_detector,
)

__all__ = [
    "ATSS",
    "FCOS",
    "POTO",
    "CondInst",
    "Conversion",
    "Detector",
    "DetectorConfig",
    "MatchReport",
    "RetinaNet",
    "SOLOv2",
    "TwoStage",
    "build_detector",
    "check_teacher",
    "convert_checkpoint",
    "inherit",
    "load_backbone_weights",
    "load_detector",
    "save_detector",
    "use_detector",
]
