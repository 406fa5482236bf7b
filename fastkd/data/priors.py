"""Class frequencies and box-size statistics of the training set."""

from __future__ import annotations

import numpy as np
import torch

from fastkd.types import ClassPriors


def measure_priors(dataset) -> ClassPriors:
    """Frequency, mean and standard deviation of the normalised box size of each class.

    frequency[c] = boxes of class c / all boxes; mean and std (of the whole population, divided by n) of
    (width / image width, height / image height). A class without boxes has frequency 0, mean 0 and std 0.

    Args:
        dataset: DetectionDataset.
    Returns: ClassPriors in float64.
    Raises: ValueError if the data set has no boxes.
    Source: ICD (arXiv 2110.12724), fake queries; methods.md 1.1.
    """
    boxes, labels, owner = dataset.objects()
    if not len(labels):
        raise ValueError("measure_priors: dataset must have at least one box, got none; ICD has nothing to learn from")
    sizes = (boxes[:, 2:].astype(np.float64) - boxes[:, :2]) / dataset.sizes[owner]
    count = np.bincount(labels, minlength=dataset.num_classes)
    mean, std = np.zeros((2, dataset.num_classes, 2))
    divisor = np.maximum(count, 1)
    for axis in range(2):
        mean[:, axis] = np.bincount(labels, sizes[:, axis], dataset.num_classes) / divisor
        spread = (sizes[:, axis] - mean[labels, axis]) ** 2
        std[:, axis] = np.sqrt(np.bincount(labels, spread, dataset.num_classes) / divisor)
    return ClassPriors(torch.from_numpy(count / count.sum()), torch.from_numpy(mean), torch.from_numpy(std))
