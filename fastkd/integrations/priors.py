"""Class priors for ICD's fake queries, measured from the host's targets."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.ops._support.normalizer import is_distributed
from fastkd.types import Batch, ClassPriors

MEASURED_STEPS = 1000  # number of batches to measure the priors on
UNSEEN_MEAN, UNSEEN_STD = 0.2, 0.1  # box sides of a class without boxes so far, as fractions of the image's


class RunningPriors:
    """Counts, sums and squares of the normalised box sizes of each class.

    Args:
        num_classes: object classes.
        device: device of the targets.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.sums = torch.zeros(num_classes, 5, dtype=dtype, device=device)  # count, w, h, w^2, h^2
        self.steps = 0

    def add(self, boxes: Tensor, labels: Tensor, sizes: Tensor, *, shared: bool = False) -> None:
        """Adds boxes [K, 4] xyxy of classes labels [K] in images of (height, width) sizes [K, 2].

        shared: add the boxes of all processes; all processes must call this together.
        """
        wh = (boxes[:, 2:] - boxes[:, :2]).to(self.sums) / sizes.to(self.sums).flip(1)
        rows = torch.cat([torch.ones_like(wh[:, :1]), wh, wh.square()], dim=1)
        added = torch.zeros_like(self.sums).index_put((labels,), rows, accumulate=True)
        if shared and is_distributed():
            dist.all_reduce(added)
        self.sums += added
        self.steps += 1

    def add_batch(self, batch: Batch) -> None:
        """Adds the boxes of a batch of every process; all processes call it together."""
        self.add(batch.boxes, batch.labels, batch.image_sizes[batch.image_index], shared=True)

    def priors(self) -> ClassPriors:
        """Frequency, mean and standard deviation so far; equal frequencies before the first box."""
        count, mean, square = self.sums.split([1, 2, 2], dim=1)
        total, divisor = count.sum(), count.clamp(min=1)
        mean, square = mean / divisor, square / divisor
        std = (square - mean.square()).clamp(min=0).sqrt()
        seen = count > 0
        frequency = torch.where(total > 0, count[:, 0] / total.clamp(min=1), 1 / len(count))
        return ClassPriors(frequency, torch.where(seen, mean, UNSEEN_MEAN), torch.where(seen, std, UNSEEN_STD))

    def state_dict(self) -> dict[str, object]:
        """The state for resuming."""
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Restores the result of `state_dict`."""
        self.sums, self.steps = state["sums"].to(self.sums), state["steps"]


def check_priors(priors: object) -> None:
    """Raises TypeError unless the priors are a `ClassPriors` or None."""
    if priors is not None and not isinstance(priors, ClassPriors):
        raise TypeError(
            f"attach: priors must be a ClassPriors or None in this host, got {type(priors).__name__}; pass "
            "fastkd.integrations.measure_priors(<boxes, labels and size of each image>, num_classes), or None to "
            "measure them on the first batches"
        )


def measure_priors(
    targets: Iterable[tuple[Tensor, Tensor, tuple[int, int]]], num_classes: int, *, first_label: int = 0
) -> ClassPriors:
    """Class priors of a whole training set.

    Args:
        targets: for each image boxes [K, 4] xyxy in pixels, labels [K] and (height, width).
        num_classes: object classes, without background.
        first_label: the label of the first class.
    Raises: ValueError if there are no boxes.
    """
    running = RunningPriors(num_classes)
    for boxes, labels, size in targets:
        sizes = torch.tensor([list(size)]).expand(len(boxes), -1)
        running.add(torch.as_tensor(boxes).reshape(-1, 4), torch.as_tensor(labels) - first_label, sizes)
    if not running.sums[:, 0].any():
        raise ValueError("measure_priors: targets must hold at least one box, got none; pass the training set")
    return running.priors()
