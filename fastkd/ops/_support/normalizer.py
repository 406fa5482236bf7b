"""The divisor of a loss whose batch is split over processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

_recorded: list[Tensor] | None = None  # of the innermost `recorded_counts`


def is_distributed() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def recorded_counts() -> Iterator[list[Tensor]]:
    """Yields a list, to which `global_mean` adds the count of every call that waits for other processes."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


@torch.no_grad()
def global_mean(count: Tensor) -> Tensor:
    """Average of a count over the processes of a distributed run; the count itself without one.

    If each process divides its sum s_r by this mean, and DDP averages the gradients, they equal those of one process
    with the whole batch: (1/R) sum_r s_r / ((1/R) sum_r n_r) = sum_r s_r / sum_r n_r.

    Args:
        count: any shape, integer or floating point; every process calls with the same shape.
    Returns: float32 (float64 for float64), same shape and device, no gradient.
    Raises: TypeError if count is not a tensor.
    """
    if not isinstance(count, Tensor):
        raise TypeError(f"global_mean: count must be a tensor, got {type(count).__name__}; wrap it in torch.tensor")
    mean = count.detach().to(torch.float64 if count.dtype == torch.float64 else torch.float32)
    if is_distributed():
        mean = mean.clone()
        if _recorded is not None:
            _recorded.append(mean)
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
    return mean
