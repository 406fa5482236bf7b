"""Any feature backbone of the timm package, which is an optional extra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastkd.detectors.backbones.base import Backbone

STRIDES = (4, 8, 16, 32)


class TimmBackbone(Backbone):
    """timm.create_model(name, features_only=True) with random weights; nothing is downloaded.

    A weight file may have the names of the whole timm model.

    Args:
        name: of a timm model with maps of strides 4, 8, 16 and 32, e.g. "convnext_tiny".
    Raises: ImportError without timm; ValueError if timm knows no such model or it has other strides.
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
        except RuntimeError as error:  # timm's word for a name it does not know
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
        self.places = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]  # the last of each
        self.out_channels = [channels[place] for place in self.places]
        layout = getattr(self.body, "output_fmt", "NCHW")
        self.channels_last = str(getattr(layout, "value", layout)) == "NHWC"

    def own_name(self, name: str, known: Mapping[str, Tensor]) -> str:
        """timm's own name with the prefix `body.`; where timm flattened the model, stages.0 is stages_0."""
        flat = name.replace(".", "_")
        return next((key for key in known if key.removeprefix("body.").replace(".", "_") == flat), name)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps C2 .. C5 (strides 4, 8, 16, 32) of images [B, 3, H, W]."""
        maps = self.body(images)
        maps = [maps[place] for place in self.places]
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_last else maps
