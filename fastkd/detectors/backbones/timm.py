"""Any feature backbone of the timm package, which is an optional extra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastkd.detectors.backbones.base import Backbone

STRIDES = (4, 8, 16, 32)


class TimmBackbone(Backbone):
    """timm.create_model(name, features_only=True) with random weights; nothing is downloaded.

    Weight files may use the names of the complete timm model.

    Args:
        name: of a timm model with maps of strides 4, 8, 16 and 32, e.g. "convnext_tiny".
    Raises: ImportError without timm; ValueError if timm has no such model or its strides differ.
    """

    def __init__(self, name: str):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                f"backbone timm:{name} needs the package timm, which is not installed; pip install 'fastkd[timm]'"
            ) from error
        try:
            self.body: Any = timm.create_model(name, features_only=True, pretrained=False)
        except RuntimeError as error:  # raised by timm for an unknown name
            raise ValueError(
                f"DetectorConfig: backbone must be a model timm can build, got timm:{name}: {error}"
            ) from error
        info: Any = self.body.feature_info
        strides, channels = list(info.reduction()), list(info.channels())
        if not set(STRIDES) <= set(strides):
            raise ValueError(
                f"DetectorConfig: backbone must have maps of strides {STRIDES}, got timm:{name} with {tuple(strides)}; "
                "choose a hierarchical model"
            )
        self.map_indices = [
            len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES
        ]  # last map of each stride
        self.out_channels = [channels[index] for index in self.map_indices]
        layout = getattr(self.body, "output_fmt", "NCHW")
        self.channels_last = str(getattr(layout, "value", layout)) == "NHWC"

    def own_name(self, name: str, known: Mapping[str, Tensor]) -> str:
        """timm's name with the prefix `body.`; in models that timm flattens, stages.0 becomes stages_0."""
        flat = name.replace(".", "_")
        return next((key for key in known if key.removeprefix("body.").replace(".", "_") == flat), name)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps C2 .. C5 (strides 4, 8, 16, 32) of images [B, 3, H, W]."""
        maps = self.body(images)
        maps = [maps[index] for index in self.map_indices]
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_last else maps
