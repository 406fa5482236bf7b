"""Block sizes, warps and stages of the attention kernels, by shape and card: a small table, no tuning at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """What a configuration depends on.

    Args:
        count: N, queries.
        channels: C.
        depth: of queries (C where keys are the cells).
        value_depth: d_v.
        element_size: bytes of a number of the pyramids.
        projected: keys are key_weight times the cells.
    """

    count: int
    channels: int
    depth: int
    value_depth: int
    element_size: int
    projected: bool


@dataclass(frozen=True)
class Configuration:
    """A kernel's blocks.

    Args:
        queries: of a head in one block, a power of two from 16 on.
        rows, columns: of a tile of cells, powers of two; rows * columns from 16 on.
        warps: of a program.
        stages: of the loop over tiles, loaded ahead.
    """

    queries: int
    rows: int
    columns: int
    warps: int
    stages: int


def wanted_programs(device: torch.device) -> int:
    """Programs that fill the card several times over."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _block(count: int, most: int) -> int:
    """A power of two that holds `count`, from 16 to `most`."""
    return min(max(16, 1 << max(count - 1, 0).bit_length()), most)


def forward(shape: Shape) -> Configuration:
    return Configuration(_block(shape.count, 64), 4, 16, warps=4, stages=2)


def backward(shape: Shape) -> Configuration:
    return Configuration(_block(shape.count, 64), 4, 16, warps=8, stages=1)


def mass(shape: Shape) -> Configuration:
    return Configuration(_block(shape.count, 64), 4, 16, warps=4, stages=2)
