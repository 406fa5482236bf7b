"""Block sizes, warps and stages of the Triton kernels, by shape and card: a small table, no tuning at run time.

A row is chosen from the compiled kernels (benchmarks/gpu/triton_report.py): the largest tile without a spilled
register. Contiguous maps take short tiles of wide rows and more warps: their rows begin anywhere, so that they are read
number by number, through registers; channels-last cells are copied straight into shared memory, a tile ahead.

A block's size depends on whether keys are projected, not on the number of queries, which changes from batch to batch:
each size would be a kernel to compile. Absorbed keys come with few queries (fastkd/ops/instance_attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """What a configuration depends on in the card.

    Args:
        generation: 8 (sm_80 and everything without the instructions of the other two), 9 (sm_90) or 10 (sm_100).
        processors: streaming multiprocessors.
    """

    generation: int
    processors: int

    @classmethod
    def of(cls, device: torch.device) -> Card:
        """The card that a device is; for devices without one, as the interpreter has, the smallest."""
        if device.type != "cuda":
            return cls(8, 1)
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.major if properties.major in (9, 10) else 8, properties.multi_processor_count)

    @property
    def wanted_programs(self) -> int:
        """Programs that fill it several times over."""
        return 4 * self.processors


@dataclass(frozen=True)
class Shape:
    """What a configuration depends on in the call.

    Args:
        count: N, queries.
        channels: C.
        element_size: bytes of a number of the pyramids.
        projected: keys are key_weight times the cells.
        last: levels are channels-last.
        exact: products of float32 or float64 as IEEE has them, without matrix instructions (float64: with those of
            few cards).
    """

    count: int
    channels: int
    element_size: int
    projected: bool
    last: bool
    exact: bool = False


@dataclass(frozen=True)
class Configuration:
    """A kernel's blocks.

    Args:
        queries: of a head in one block, a power of two from 16 on.
        rows, columns: of a tile of cells, powers of two; rows * columns from 16 on.
        warps: of a program.
        stages: of the loop over tiles; 2: one tile is loaded ahead.
        pair: a program of the forward pass takes two heads, where there is an even number.
        apart: the gradients of queries and key_weight are added up in memory, where registers have no room for them.
    """

    queries: int
    rows: int
    columns: int
    warps: int
    stages: int
    apart: bool = False
    pair: bool = False


FEW = 32  # queries up to which a GPU moves the key projection to them: one block


def _queries(shape: Shape) -> int:
    """Queries in a block: of float64 no more have room."""
    return 16 if shape.element_size == 8 else 64 if shape.projected else FEW


def _tile(shape: Shape, cells: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most so many cells, fewer where channels or numbers are larger than usual."""
    cells = max(cells * 2 * 256 // (shape.element_size * max(shape.channels, 256)), 16)
    cells = 1 << (cells.bit_length() - 1)
    columns = min(16 if shape.last else 32, cells)
    return cells // columns, columns


def forward(shape: Shape, card: Card) -> Configuration:
    if shape.exact:  # a thread holds whole rows of both operands
        double = shape.element_size == 8
        warps = 16 if double and (shape.last or not shape.projected) else 8
        # Without a tile ahead a block of 64 queries spills on sm_100.
        ahead = shape.last and shape.projected and not double
        return Configuration(_queries(shape), *_tile(shape, 32), warps, 2 if ahead else 1)
    if shape.last and shape.element_size == 2 and shape.projected:  # two heads' weights and sums fit beside small tiles
        return Configuration(_queries(shape), *_tile(shape, 32), 4, 2, pair=True)
    warps = 4 if shape.last and card.generation < 10 else 8
    stages = 2 if shape.last and (shape.element_size == 2 or card.generation < 10) else 1
    return Configuration(_queries(shape), *_tile(shape, 64), warps, stages)


def backward(shape: Shape, card: Card) -> Configuration:
    if shape.element_size == 8 or (shape.element_size == 4 and shape.projected):
        return _backward_of_wide_numbers(shape, card)
    queries = _queries(shape)
    blocks = shape.count > queries
    if blocks:  # after each other they take registers for their addresses
        queries = min(queries, 16 if card.generation == 10 or shape.element_size == 4 else 32)
    apart = shape.element_size == 4 and (shape.exact or not shape.last)
    queries = 16 if apart else queries
    together = not blocks and not apart
    # sm_100 keeps sums in tensor memory, and so has registers for larger tiles, but not for two of them.
    cells = 64 if shape.last and card.generation == 10 and together else 32
    ahead = shape.last and card.generation < 10 and together and shape.element_size == 2
    return Configuration(queries, *_tile(shape, cells), 8, 2 if ahead else 1, apart)


def _backward_of_wide_numbers(shape: Shape, card: Card) -> Configuration:
    """float64, which only gradcheck needs, and float32 with projected keys, whose weight has a gradient beside."""
    queries = 64 if shape.exact and shape.element_size == 4 else 16
    apart = shape.projected and (shape.element_size == 8 or (not shape.exact and card.generation == 8))
    return Configuration(queries, *_tile(shape, 32), 8, 1, apart)


def mass(shape: Shape, card: Card) -> Configuration:
    if shape.exact:
        warps = 16 if shape.element_size == 8 and shape.projected else 8
        cells = 32 if shape.projected and not shape.last else 64
        return Configuration(16, *_tile(shape, cells), warps, 1)
    halves = shape.element_size == 2
    warps = 4 if (shape.last if halves else not shape.projected) else 8
    stages = 2 if card.generation < 10 and halves else 1
    return Configuration(64 if shape.projected else 16, *_tile(shape, 64), warps, stages)
