"""The median box of a training set, as the student sees it, and the pyramid level that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

STRIDES_OF_A_BOX = 8.0  # side of a level's boxes in strides, for detectors without imitation anchors


@dataclass(frozen=True)
class MedianBox:
    """The box with the median area.

    Args:
        width, height: pixels of the training images after resizing.
        stride: of its level.
    """

    width: float
    height: float
    stride: int

    @property
    def cells(self) -> float:
        """The number of cells of its level that it covers."""
        return self.width * self.height / self.stride**2

    @property
    def level(self) -> str:
        """The level's name: P_n has stride 2^n."""
        return f"P{self.stride.bit_length() - 1}"


def median_box(
    boxes: np.ndarray,
    image_sizes: np.ndarray,
    sides: tuple[int, int],
    anchors: Sequence[Tensor],
    strides: Sequence[int],
) -> MedianBox:
    """The median box of a data set.

    Args:
        boxes: [K, 4] xyxy in pixels of the image files, K >= 1.
        image_sizes: [K, 2], (width, height) of each box's image file.
        sides: (short side, maximum side) of the images after resizing.
        anchors: L tensors [A, 4] xyxy, the detector's imitation anchors: the level of a box has the anchor with the
            highest IoU, both centred on one point. [] takes squares of STRIDES_OF_A_BOX strides.
        strides: of the levels.
    """
    scale = np.minimum(sides[0] / image_sizes.min(1), sides[1] / image_sizes.max(1))
    wh = (boxes[:, 2:] - boxes[:, :2]) * scale[:, None]
    width, height = wh[np.argsort(wh.prod(1), kind="stable")[len(wh) // 2]]

    def fit(level: int) -> float:
        """The highest IoU of the box with an anchor of a level."""
        if not anchors:
            side = np.full((1, 2), STRIDES_OF_A_BOX * strides[level])
        else:
            side = (anchors[level][:, 2:] - anchors[level][:, :2]).double().cpu().numpy()  # [A, 2]
        overlap = np.minimum(side, [width, height]).prod(1)
        return float((overlap / (side.prod(1) + width * height - overlap)).max())

    return MedianBox(float(width), float(height), int(strides[max(range(len(strides)), key=fit)]))
