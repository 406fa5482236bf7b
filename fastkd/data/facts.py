"""What a recipe needs to know about a data set: its amount, and the sizes of its images and boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastkd.data.coco import DetectionDataset


@dataclass(frozen=True)
class DataFacts:
    """Numbers of a training set; lengths in pixels of the image files. The side of a box is sqrt(width * height).

    Args:
        images, objects, classes: counts, without crowd regions.
        most_objects: objects of the fullest image.
        small_box: side that a tenth of the boxes do not reach.
        median_box: median side of the boxes.
        ratios: height / width of boxes, the quantiles 1/6, 1/2 and 5/6.
        short_side: median of the images' short sides.
        elongation: long / short side of images, the quantile 0.9.
    """

    images: int
    objects: int
    classes: int
    most_objects: int
    small_box: float
    median_box: float
    ratios: tuple[float, float, float]
    short_side: float
    elongation: float


def measure_facts(dataset: DetectionDataset) -> DataFacts:
    """The facts of a data set.

    Raises: ValueError if it has no objects.
    """
    boxes, _, owner = dataset.objects()
    if not len(boxes):
        raise ValueError(
            f"measure_facts: dataset must have at least one object, got none in {len(dataset)} images; check the file"
        )
    width, height = (boxes[:, 2:].astype(np.float64) - boxes[:, :2]).T
    small, median = np.quantile(np.sqrt(width * height), (0.1, 0.5)).tolist()
    low, middle, high = np.quantile(height / width, (1 / 6, 1 / 2, 5 / 6)).tolist()
    sides = np.sort(dataset.sizes, axis=1)
    return DataFacts(
        images=len(dataset),
        objects=len(boxes),
        classes=dataset.num_classes,
        most_objects=int(np.bincount(owner).max()),
        small_box=small,
        median_box=median,
        ratios=(low, middle, high),
        short_side=float(np.median(sides[:, 0])),
        elongation=float(np.quantile(sides[:, 1] / sides[:, 0], 0.9)),
    )
