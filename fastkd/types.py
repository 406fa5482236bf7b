"""Shared types: a batch of images with its ground truth, detections, and class priors.

Every other package of fastkd may import this module; it imports no module of fastkd.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """Images of one step and their ground truth, boxes of all images concatenated.

    Args:
        images: [B, 3, H, W] float, normalised, zero in the padding.
        image_sizes: [B, 2] int64, (height, width) of each image before padding.
        boxes: [K, 4] float32 xyxy in pixels of the padded batch.
        labels: [K] int64 in [0, num_classes).
        image_index: [K] int64 in [0, B), ascending.
        counts: number of boxes in each image, B Python ints (on the host, to avoid a device synchronisation).
        masks: [K, H, W] bool in the padded batch, or None.
        ignore_boxes: [I, 4] float32 xyxy, regions that are neither object nor background (crowds).
        ignore_index: [I] int64 in [0, B).
        image_ids: B dataset ids.
        original_sizes: [B, 2] int64, (height, width) of the image files.
        seeds: B Python ints; a loss draws its random numbers for image b from seeds[b], so that they do not depend on
            how the batch is split over processes.
    """

    images: Tensor
    image_sizes: Tensor
    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    counts: list[int]
    masks: Tensor | None = None
    ignore_boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4))
    ignore_index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    image_ids: list[int] = field(default_factory=list)
    original_sizes: Tensor | None = None
    seeds: list[int] = field(default_factory=list)

    @property
    def padded_size(self) -> tuple[int, int]:
        """(H, W) of the padded batch, pixels."""
        return self.images.shape[-2], self.images.shape[-1]

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device, non_blocking: bool = False, memory_format=None) -> Batch:
        """The same batch with every tensor on `device`; `memory_format` applies to the images."""
        moved: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            moved[item.name] = value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
        if memory_format is not None:
            moved["images"] = moved["images"].contiguous(memory_format=memory_format)
        return Batch(**moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the data loader)."""
        pinned: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            pinned[item.name] = value.pin_memory() if isinstance(value, Tensor) else value
        return Batch(**pinned)


@dataclass
class Detections:
    """Detections of one image, in order of descending score.

    Args:
        boxes: [D, 4] float32 xyxy in pixels of the resized image, clipped to it.
        scores: [D] float32 in [0, 1].
        labels: [D] int64 in [0, num_classes).
        masks: [D, h, w] bool over the resized image (before padding), or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return self.boxes.shape[0]


@dataclass(frozen=True)
class ClassPriors:
    """Class frequencies and box-size statistics of a training set, for ICD's fake queries.

    Args:
        frequency: [num_classes] float64, sums to 1 (a class that never occurs has 0).
        mean: [num_classes, 2] float64, mean (width, height) normalised by the image's.
        std: [num_classes, 2] float64, standard deviation of the same.
    """

    frequency: Tensor
    mean: Tensor
    std: Tensor

    @property
    def num_classes(self) -> int:
        return self.frequency.shape[0]
