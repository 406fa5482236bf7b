"""Detections of a run as arrays: a twentieth of the memory of the objects in detections.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastkd.report.analysis import ImageDetections

INT64 = range(-(2**63), 2**63)


@dataclass
class Results:
    """D detections in COCO's result format, in order of image and then of falling score.

    Args:
        image_ids, category_ids: [D] int64.
        scores: [D].
        boxes: [D, 4] xyxy.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def of_image(self, image_id: int, labels: dict[int, int], size: np.ndarray) -> ImageDetections:
        """The detections of an image, clipped to it; those of unknown categories are left out.

        Args:
            image_id: its id.
            labels: category id -> label.
            size: (width, height), pixels.
        """
        begin, end = np.searchsorted(self.image_ids, [image_id, image_id + 1])
        found = np.array([labels.get(category, -1) for category in self.category_ids[begin:end].tolist()], np.int64)
        rows = begin + np.flatnonzero(found >= 0)
        return ImageDetections(np.clip(self.boxes[rows], 0, np.tile(size, 2)), self.scores[rows], found[found >= 0])


def to_results(items: list) -> tuple[Results, int]:
    """The entries of detections.json as arrays, and the number of entries that are not COCO results."""
    kept = [item for item in items if _is_result(item)]
    images = np.array([item["image_id"] for item in kept], np.int64)
    categories = np.array([item["category_id"] for item in kept], np.int64)
    scores = np.array([item["score"] for item in kept], np.float64)
    boxes = np.array([item["bbox"] for item in kept], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
    order = np.lexsort((-scores, images))
    return Results(images[order], categories[order], scores[order], boxes[order]), len(items) - len(kept)


def _is_result(item: Any) -> bool:
    if not isinstance(item, dict) or not _finite(item.get("score")):
        return False
    box = item.get("bbox")
    ids = (item.get("image_id"), item.get("category_id"))
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(_finite(value) for value in box)
        and all(isinstance(value, int) and value in INT64 for value in ids)
    )


def _finite(value: Any) -> bool:
    """Whether a JSON value is a number that float64 can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= 1e300  # False for NaN
