"""The interface of a detector that the rest of fastkd uses: four methods and a few properties."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from fastkd.detectors.backbones.base import Backbone
from fastkd.detectors.config import DetectorConfig
from fastkd.types import Batch, Detections


def concat_pyramids(pyramids: list[list[Tensor]]) -> list[Tensor]:
    """R pyramids of B images, concatenated to one pyramid of R * B images."""
    return pyramids[0] if len(pyramids) == 1 else [torch.cat(level) for level in zip(*pyramids, strict=True)]


def split_losses(losses: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Losses [R] by name -> the losses of each of the R pyramids."""
    return [dict(zip(losses, row)) for row in zip(*(value.unbind() for value in losses.values()), strict=True)]


class Detector(nn.Module):
    """A detector on a feature pyramid. Distillers and the trainer use only this interface.

    Its parts are the registered modules `backbone`, `neck` and `head`, so state-dict keys start with these names.
    `loss` and `detect` do the same in train and in eval mode (apart from normalisation layers).
    """

    head: nn.Module

    def __init__(self, config: DetectorConfig, backbone: Backbone, neck: nn.Module, head: nn.Module):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.neck = neck
        self.head = head

    @property
    def num_classes(self) -> int:
        """Object classes, without background."""
        return self.config.num_classes

    @property
    def channels(self) -> int:
        """Channels of every pyramid level."""
        return self.config.channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from one cell to the next, level by level."""
        return self.config.strides

    def features(self, images: Tensor) -> list[Tensor]:
        """The pyramid of a batch.

        Args:
            images: [B, 3, H, W], normalised.
        Returns: L tensors [B, channels, H_l, W_l], H_l = ceil(H / stride), finest first.
        """
        return self.neck(self.backbone(images))

    def parts(self) -> dict[str, nn.Module]:
        """The modules to freeze or to inherit, by name."""
        return {"backbone": self.backbone, "neck": self.neck, "head": self.head}

    def tensor_parts(self) -> dict[str, nn.Module]:
        """The modules of the head whose forward only computes on tensors, by name; torch.compile is applied to them."""
        return {"head": self.head}

    def loss(self, pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The detection losses of a pyramid, scalars in float32 by name; the detector is trained on their sum.

        Their gradients, averaged over processes with equally many images each, equal those of one process with all
        images. A detector implements this method or `losses`.
        """
        return self.losses([pyramid], batch)[0]

    def losses(self, pyramids: list[list[Tensor]], batch: Batch) -> list[dict[str, Tensor]]:
        """`loss` of several pyramids of one batch; fastkd's detectors call the head once where results do not change.

        Raises: NotImplementedError if the detector implements neither this method nor `loss`.
        """
        if type(self).loss is Detector.loss:
            raise NotImplementedError(f"{type(self).__name__}: loss must be written, got neither loss nor losses")
        return [self.loss(pyramid, batch) for pyramid in pyramids]

    @abstractmethod
    def detect(self, pyramid: list[Tensor], batch: Batch) -> list[Detections]:
        """The detections of each image, without gradient, strongest first, in pixels of the resized image."""

    def imitation_anchors(self) -> list[Tensor]:
        """The anchors of the cell at the origin: L tensors [A, 4] xyxy; optional, used by FGFI.

        The anchors of cell (y, x) of a level are shifted by (x, y, x, y) * stride. The default is an empty list, for
        detectors whose cells have no boxes (SOLOv2).
        """
        return []

    def cell_scores(self, pyramid: list[Tensor]) -> list[Tensor]:
        """The highest probability of any class in each cell, L tensors [B, 1, H_l, W_l]; used by ScoreL2.

        Two-stage detectors return the highest objectness of a cell's anchors.
        Raises: ValueError for a detector whose cells have no scores (the default).
        """
        name = self.config.custom or type(self).__name__
        raise ValueError(f"cell_scores: the detector must score its cells, got a {name}; take a method without scores")
