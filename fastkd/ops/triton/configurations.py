"""Block sizes, warps and stages of the Triton kernels by shape and card: a small table, no autotuning.

Entries are chosen from the compiled kernels (benchmarks/gpu/triton_report.py): the largest tile without register
spills. Contiguous maps use tiles with few, wide rows and more warps: their rows are unaligned, so they are loaded
element by element through registers. Channels-last cells are copied directly into shared memory, one tile ahead.

The block size depends on whether keys are projected, not on the number of queries: that changes from batch to batch,
and each block size is compiled separately. Absorbed keys are used for few queries (fastkd/ops/instance_attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """Properties of the card that a configuration depends on.

    Args:
        generation: 8 (sm_80 and cards without the instructions of the other two), 9 (sm_90) or 10 (sm_100).
        processors: streaming multiprocessors.
    """

    generation: int
    processors: int

    @classmethod
    def of(cls, device: torch.device) -> Card:
        """The card of a device; the smallest one for other devices, as used by the interpreter."""
        if device.type != "cuda":
            return cls(8, 1)
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.major if properties.major in (9, 10) else 8, properties.multi_processor_count)

    @property
    def wanted_programs(self) -> int:
        """Number of programs that fills the card several times."""
        return 4 * self.processors


@dataclass(frozen=True)
class Shape:
    """Properties of the call that a configuration depends on.

    Args:
        count: N, queries.
        channels: C.
        element_size: bytes per element of the pyramids.
        projected: keys are key_weight times the cells.
        last: levels are channels-last.
        exact: IEEE products of float32 or float64, without matrix instructions (float64: on most cards).
    """

    count: int
    channels: int
    element_size: int
    projected: bool
    last: bool
    exact: bool = False


@dataclass(frozen=True)
class Configuration:
    """Block sizes of a kernel.

    Args:
        queries: queries of a head in one block, a power of two, at least 16.
        rows, columns: of a tile of cells, powers of two; rows * columns at least 16.
        warps: warps per program.
        stages: pipeline stages of the loop over tiles; 2: one tile is loaded ahead.
        pair: a program of the forward pass processes two heads, if their number is even.
        sums_in_memory: accumulate the gradients of queries and key_weight in memory instead of registers.
        single: the backward pass handles all queries as one block, without a loop over blocks. Only with absorbed keys:
            a kernel is compiled for absorbed and for projected keys, not also for each number of blocks.
    """

    queries: int
    rows: int
    columns: int
    warps: int
    stages: int
    sums_in_memory: bool = False
    pair: bool = False
    single: bool = False


FEW = 32  # maximum number of queries with absorbed keys on a GPU: one block


def _queries(shape: Shape) -> int:
    """Queries per block, limited by registers for float64."""
    return 16 if shape.element_size == 8 else 64 if shape.projected else FEW


def _tile(shape: Shape, cells: int) -> tuple[int, int]:
    """Rows and columns of a tile with at most `cells` cells; fewer for many channels or wide elements."""
    cells = max(cells * 2 * 256 // (shape.element_size * max(shape.channels, 256)), 16)
    cells = 1 << (cells.bit_length() - 1)
    columns = min(16 if shape.last else 32, cells)
    return cells // columns, columns


def forward(shape: Shape, card: Card) -> Configuration:
    if shape.exact:  # each thread holds complete rows of both operands
        double = shape.element_size == 8
        warps = 16 if double and (shape.last or not shape.projected) else 8
        # Without prefetching a tile, a block of 64 queries spills on sm_100.
        ahead = shape.last and shape.projected and not double
        return Configuration(_queries(shape), *_tile(shape, 32), warps, 2 if ahead else 1)
    if (
        shape.last and shape.element_size == 2 and shape.projected
    ):  # weights and sums of two heads leave room for small tiles
        return Configuration(_queries(shape), *_tile(shape, 32), 4, 2, pair=True)
    warps = 4 if shape.last and card.generation < 10 else 8
    stages = 2 if shape.last and (shape.element_size == 2 or card.generation < 10) else 1
    return Configuration(_queries(shape), *_tile(shape, 64), warps, stages)


def backward(shape: Shape, card: Card) -> Configuration:
    if shape.element_size == 8 or (shape.element_size == 4 and shape.projected):
        return _backward_of_wide_numbers(shape, card)
    queries = _queries(shape)
    blocks = shape.projected or shape.count > queries
    if blocks:  # the loop over blocks needs registers for addresses
        queries = min(queries, 16 if card.generation == 10 or shape.element_size == 4 else 32)
    sums_in_memory = shape.element_size == 4 and (shape.exact or not shape.last)
    queries = 16 if sums_in_memory else queries
    single = not blocks and not sums_in_memory
    # sm_100 keeps sums in tensor memory, so registers suffice for larger tiles, but not for two of them.
    cells = 64 if shape.last and card.generation == 10 and single else 32
    ahead = shape.last and card.generation < 10 and single and shape.element_size == 2
    return Configuration(queries, *_tile(shape, cells), 8, 2 if ahead else 1, sums_in_memory, single=single)


def _backward_of_wide_numbers(shape: Shape, card: Card) -> Configuration:
    """float64 (only for gradcheck), and float32 with projected keys, which also have a weight gradient."""
    queries = 64 if shape.exact and shape.element_size == 4 else 16
    sums_in_memory = shape.projected and (shape.element_size == 8 or (not shape.exact and card.generation == 8))
    return Configuration(queries, *_tile(shape, 32), 8, 1, sums_in_memory)


def mass(shape: Shape, card: Card) -> Configuration:
    if shape.exact:
        warps = 16 if shape.element_size == 8 and shape.projected else 8
        cells = 32 if shape.projected and not shape.last else 64
        return Configuration(16, *_tile(shape, cells), warps, 1)
    halves = shape.element_size == 2
    warps = 4 if (shape.last if halves else not shape.projected) else 8
    stages = 2 if card.generation < 10 and halves else 1
    return Configuration(64 if shape.projected else 16, *_tile(shape, 64), warps, stages)
