"""A teacher's detections on a batch, for the report; packages are recognised by attributes, not imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.integrations.teachers import Normalization, corners

Detections = list[tuple[Tensor, Tensor, Tensor]]  # boxes xyxy in pixels, labels from 0, scores of each image
DIVISOR = 32  # coarsest stride of these detectors: their pyramids need sides that it divides


class DetectTorchvision:
    """Runs a torchvision detector on images in [0, 1].

    Args:
        detector: in eval mode.
        first_label: the label of the first class.
    """

    def __init__(self, detector: nn.Module, first_label: int):
        self.detector, self.first_label = detector, first_label

    def __call__(self, images: Sequence[Tensor]) -> Detections:
        found = self.detector(list(images))
        return [(result["boxes"], result["labels"] - self.first_label, result["scores"]) for result in found]


class DetectTransformers:
    """Runs a detector of transformers whose classes are scored by a sigmoid on images in [0, 1].

    Args:
        detector: in eval mode.
        normalization: of its image processor.
    """

    def __init__(self, detector: Any, normalization: Normalization):
        self.detector, self.normalization = detector, normalization

    def __call__(self, images: Sequence[Tensor]) -> Detections:
        mean, std = (torch.tensor(value)[:, None, None] for value in (self.normalization.mean, self.normalization.std))
        found = []
        for image in images:
            padded = pad((image - mean.to(image)) / std.to(image))
            output = self.detector(pixel_values=padded)
            scores, labels = output.logits[0].float().sigmoid().max(1)
            found.append((corners(output.pred_boxes[0], *padded.shape[2:]), labels, scores))
        return found


class DetectUltralytics:
    """Runs a YOLO's network on images in [0, 1]; overlapping boxes stay, as no object is counted twice.

    Args:
        network: in eval mode.
        head: its last layer.
    """

    def __init__(self, network: nn.Module, head: Any):
        self.network, self.head = network, head

    def __call__(self, images: Sequence[Tensor]) -> Detections:
        found = []
        for image in images:
            output = self.network(pad(image))[0]
            if self.head.end2end:  # [1, N, 6]: xyxy, score, class
                boxes, scores, labels = output[0].float().split([4, 1, 1], dim=1)
                found.append((boxes, labels[:, 0].long(), scores[:, 0]))
            else:  # [1, 4 + classes, anchors]: centre and size in pixels, class scores
                boxes, probabilities = output[0].float().T.split([4, self.head.nc], dim=1)
                scores, labels = probabilities.max(1)
                found.append((corners(boxes, 1, 1), labels, scores))
        return found


def pad(image: Tensor) -> Tensor:
    """An image [3, h, w] as a batch [1, 3, H, W] with zeros below and to the right, H and W divisible by DIVISOR."""
    height, width = image.shape[1:]
    return F.pad(image, (0, -width % DIVISOR, 0, -height % DIVISOR))[None]
