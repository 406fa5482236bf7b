"""Detectors from outside of fastkd: a class that the recipe names "module:Class", behind the protocol of this package.

    class Tiny(nn.Module):
        strides = (8, 16, 32)                  # pixels from cell to cell; optional, as is `channels`: config's
        def __init__(self, config): ...        # a DetectorConfig: num_classes, channels, width, thresholds
        def features(self, images): ...        # [B, 3, H, W] -> L tensors [B, channels, ceil(H / stride), ...]
        def loss(self, pyramid, batch): ...    # {name: scalar}
        def detect(self, pyramid, batch): ...  # a Detections of each image
        def parts(self): ...                   # {"backbone": ..., "head": ...}, and "neck" if it has one

`losses`, `tensor_parts`, `imitation_anchors` and `cell_scores` of protocol.py are optional. Recipes and detector files
only name the class: its code is imported where the user asks for it (`--detector`, `use_detector`), never by a file.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.detectors.config import CLASS_NAME, DetectorConfig
from fastkd.detectors.protocol import Detector
from fastkd.types import Batch, Detections

METHODS = ("features", "loss", "detect", "parts")

_used: dict[str, type[nn.Module]] = {}


def use_detector(detector: str | type[nn.Module]) -> str:
    """Lets recipes and detector files of this process name a detector of one's own.

    Args:
        detector: the class, or "module:Class", which is imported (also from the current folder).
    Returns: "module:Class", for `DetectorConfig.custom`. The class of a script that is being run is named after the
        script's file, so that commands find it later.
    Raises: ValueError if the name is malformed or leads to no class, or a method is missing; TypeError for other types.
    """
    if isinstance(detector, str):
        name, found = detector, _imported(detector)
    elif isinstance(detector, type):
        name, found = f"{_module_of(detector)}:{detector.__qualname__}", detector
        _check_name(name)
    else:
        raise TypeError(f"detector: must be a class or 'module:Class', got {type(detector).__name__}; pass the class")
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ValueError(f"detector: {name} must be a subclass of torch.nn.Module, got {found!r}; name the class")
    missing = [method for method in METHODS if not callable(getattr(found, method, None))]
    if missing:
        raise ValueError(f"detector: {name} must have the methods {', '.join(METHODS)}, got no {', '.join(missing)}")
    _used[name] = found
    return name


def build_own(config: DetectorConfig) -> Detector:
    """The detector of one's own that `config.custom` names, with its parts and its pyramid checked.

    Raises: ValueError if `use_detector` was not called for it, or parts or pyramid are not what they must be.
    """
    name = str(config.custom)
    if name not in _used:
        raise ValueError(
            f"detector: {name} must be imported by the user and not by a file that names it, got the file alone; "
            f"pass --detector {name} if you trust that code (in Python: use_detector({name!r}))"
        )
    module = _used[name](config)
    detector = module if isinstance(module, Detector) else OwnDetector(config, module)
    parts = detector.parts()
    for part in ("backbone", "neck", "head"):
        if not isinstance(parts.get(part), nn.Module):
            raise ValueError(f"detector: parts of {name} must name its {part}, a module, got {sorted(parts)}; add it")
    _check_pyramid(name, detector)
    return detector


class OwnDetector(Detector):
    """A module with the four methods as a `Detector`; what it does not have gets the protocol's defaults.

    Args:
        config: what it was built from.
        own: the module; the names of its weights begin with "own.".
    """

    own: Any

    def __init__(self, config: DetectorConfig, own: nn.Module):
        super(Detector, self).__init__()  # the parts stay where the module has them
        self.config = config
        self.own = own

    @property
    def channels(self) -> int:
        return getattr(self.own, "channels", self.config.channels)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(getattr(self.own, "strides", self.config.strides))

    def features(self, images: Tensor) -> list[Tensor]:
        return list(self.own.features(images))

    def loss(self, pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        return self.own.loss(pyramid, batch)

    def losses(self, pyramids: list[list[Tensor]], batch: Batch) -> list[dict[str, Tensor]]:
        return getattr(self.own, "losses", super().losses)(pyramids, batch)

    def detect(self, pyramid: list[Tensor], batch: Batch) -> list[Detections]:
        return self.own.detect(pyramid, batch)

    def parts(self) -> dict[str, nn.Module]:
        return {"neck": nn.Identity(), **self.own.parts()}

    def tensor_parts(self) -> dict[str, nn.Module]:
        return getattr(self.own, "tensor_parts", dict)()

    def imitation_anchors(self) -> list[Tensor]:
        return getattr(self.own, "imitation_anchors", super().imitation_anchors)()

    def cell_scores(self, pyramid: list[Tensor]) -> list[Tensor]:
        return getattr(self.own, "cell_scores", super().cell_scores)(pyramid)


@torch.no_grad()
def _check_pyramid(name: str, detector: Detector) -> None:
    """Compares the levels of an empty image with `channels` and `strides`."""
    first = next(detector.parameters(), None)
    if first is None or first.is_meta:
        return
    side = 2 * max(detector.strides)
    detector.eval()
    levels = [tuple(level.shape) for level in detector.features(torch.zeros(1, 3, side, side, device=first.device))]
    detector.train()
    wanted = [(1, detector.channels, -(-side // stride), -(-side // stride)) for stride in detector.strides]
    if levels != wanted:
        raise ValueError(
            f"detector: features of {name} must give levels {wanted} of an image {side} x {side}, got {levels}; its "
            f"channels are {detector.channels} and its strides {detector.strides}: set the attributes `channels` and "
            "`strides` of the class, or change `features`"
        )


def _module_of(detector: type) -> str:
    """The module's name; of the script that is being run the name under which it can be imported."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return Path(file).stem if detector.__module__ == "__main__" and file else detector.__module__


def _check_name(name: str) -> None:
    if not CLASS_NAME.fullmatch(name):
        raise ValueError(f"detector: must be module:Class, as my_module:Tiny, of a class at top level, got {name!r}")


def _imported(name: str) -> Any:
    """What "module:Class" names; the current folder is searched last."""
    _check_name(name)
    module_name, class_name = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the command `fastkd` does not begin in the user's folder, unlike python -m
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: importing it may raise anything
        raise ValueError(
            f"detector: {module_name} of {name} must be an importable module, got {type(error).__name__}: {error}; run "
            "the command in the module's folder, or set PYTHONPATH to it"
        ) from error
    if not hasattr(module, class_name):
        where = getattr(module, "__file__", None) or module_name
        raise ValueError(f"detector: {name} must name a class of {where}, got no {class_name} there; check the name")
    return getattr(module, class_name)
