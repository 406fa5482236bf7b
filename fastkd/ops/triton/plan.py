"""Launch planning: checks, memory formats, the partition of a pyramid into parts, common kernel arguments."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastkd.ops.triton.configurations import Card, Configuration, Shape

PART_NUMBERS = 16
ALIGNMENT = 16  # bytes; kernels are compiled once, for aligned pointers
NARROW_LIMIT = 2**31  # from this size on, offsets within an image need 64 bits


@dataclass
class Launch:
    """One launch of a kernel on a one-dimensional grid."""

    kernel: triton.JITFunction
    programs: int
    arguments: dict
    warps: int = 4
    stages: int = 1


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run the launches in order on the current stream of the device.

    Raises: RuntimeError if Triton cannot compile or launch a kernel; torch.OutOfMemoryError as torch raises it.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for one in launches:
            if not one.programs:
                continue
            try:
                one.kernel[(one.programs,)](**one.arguments, num_warps=one.warps, num_stages=one.stages)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of several kinds: Triton's own, its C compiler's, the driver's
                lines = str(error).strip().splitlines() or [""]
                raise RuntimeError(
                    f"{one.kernel.fn.__name__}: Triton cannot compile or launch it here ({type(error).__name__}: "
                    f"{lines[0]}); `fastkd info` names what Triton lacks, and within "
                    'fastkd.ops.use_backend("reference") the ops run in plain torch'
                ) from error


def precision_of(dtype: torch.dtype) -> str:
    """Input precision of products of this dtype: "tf32" for float32 if torch's setting allows it."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def in_one_order(levels: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """The levels, dense and aligned in one memory format, and whether it is channels-last; copies only if necessary."""
    last = all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)
    last = last and not all(level.is_contiguous() for level in levels)
    order = torch.channels_last if last else torch.contiguous_format
    return [aligned(level.contiguous(memory_format=order)) for level in levels], last


def aligned(tensor: Tensor) -> Tensor:
    """The dense tensor if it begins at a multiple of ALIGNMENT bytes, as torch allocates, else a copy."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def from_aligned(tensor: Tensor) -> tuple[Tensor, int]:
    """A view that begins at a multiple of ALIGNMENT bytes, and the offset of the tensor in it, in elements.

    Tables that are views of one tensor may be unaligned: Triton would compile a kernel for each pattern of alignments.
    """
    later = tensor.data_ptr() % ALIGNMENT // tensor.itemsize
    if later > tensor.storage_offset():
        return tensor.clone(), 0
    if not later:
        return tensor, 0
    return tensor.as_strided((1,), (1,), tensor.storage_offset() - later), later


def dense_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, or a copy, contiguous, aligned and of this dtype."""
    if tensor.dtype == dtype and tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def check_like(op: str, queries: Tensor, shape: tuple[int, ...], **tensors: Tensor) -> None:
    """Raise unless the tensors have this shape and the dtype and device of the queries."""
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape or tensor.dtype != queries.dtype or tensor.device != queries.device:
            raise ValueError(
                f"{op}: {name} must be {list(shape)} of {queries.dtype} on {queries.device}, "
                f"got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}; pass what the forward op gave"
            )


def power_of_two(length: int, least: int = 16) -> int:
    """The smallest power of two that is at least `length` and `least`."""
    return max(triton.next_power_of_2(length), least)


@dataclass(frozen=True)
class Parts:
    """A pyramid partitioned into parts. A strip is one tile wide; a part is some rows of a strip of a level.

    Args:
        table: [parts, 16] int64: level, first column, first and end row, the level's rows and columns, strides of
            image, head and query in its row bias, then in its column bias; the level's cells; offsets of the row bias
            and the column bias from their pointers; index of the part in its strip.
        first: index of each level's first part, then the number of parts.
        strips, chunks: strips per level, and parts per strip, of each level.
    """

    table: Tensor
    first: tuple[int, ...]
    strips: tuple[int, ...]
    chunks: tuple[int, ...]

    @property
    def count(self) -> int:
        return self.first[-1]


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream for copying tables."""
    return torch.cuda.Stream(device)


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a table to the device, for kernels on any stream; the host waits for this copy only.

    Raises: RuntimeError while a CUDA graph is captured: the copy would become part of the graph.
    """
    if device.type != "cuda":
        return table.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "instance_attention: a CUDA graph cannot capture the first call of a shape; call it once before capturing"
        )
    with torch.cuda.stream(_copies(device)):
        copied = table.pin_memory().to(device, non_blocking=True)
    _copies(device).synchronize()
    return copied


def _keep(table: Tensor, device: torch.device) -> None:
    """Keep a table alive that the cache may drop while kernels of this call, or of a CUDA graph, still read it."""
    if torch.cuda.is_current_stream_capturing():
        if all(table is not other for other in _IN_GRAPHS):
            _IN_GRAPHS.append(table)
    else:
        table.record_stream(torch.cuda.current_stream(device))


_IN_GRAPHS: list[Tensor] = []


@functools.lru_cache(maxsize=512)
def _table_on(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Cached: calls of one shape share the table."""
    return _on_device(torch.tensor(rows, dtype=torch.int64), device)


def table_of(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A table [rows, numbers] int64 in device memory; as arguments, the numbers could specialise the kernel."""
    table = _table_on(tuple(map(tuple, rows)), device)
    if device.type == "cuda":
        _keep(table, device)
    return table


def rows_of_parts(
    sizes: Sequence[tuple[int, int]], tile: tuple[int, int], programs: int, wanted: int
) -> tuple[int, ...]:
    """Rows of a part for each level, a multiple of the tile's rows, for about `wanted` programs in total.

    Strips are divided into equal parts of about the mean number of tiles, to balance the programs.

    Args:
        sizes: (rows, columns) of the levels. tile: (rows, columns) of a tile.
        programs: programs per part: images * heads * blocks of queries.
    """
    strips = [
        (-(-height // tile[0]), -(-width // tile[1])) for height, width in sizes
    ]  # (tiles per strip, number of strips)
    mean = max(programs * sum(tiles * count for tiles, count in strips) / max(wanted, 1), 2.0)
    chunks = [max(1, round(tiles / mean)) for tiles, _ in strips]
    return tuple(max(1, -(-tiles // many)) * tile[0] for (tiles, _), many in zip(strips, chunks))


@functools.lru_cache(maxsize=256)
def _cut(sizes, biases, tile, most_rows, device) -> Parts:
    """Cached: calls of one shape share the parts. Args: biases: strides and offsets of each level's bias tables."""
    entries, first, strips, chunks = [], [0], [], []
    for level, ((height, width), (steps, begins), rows) in enumerate(zip(sizes, biases, most_rows, strict=True)):
        tops = range(0, height, rows) if height and width else ()
        lefts = range(0, width, tile[1]) if height and width else ()
        last = (height, width, *steps, height * width, *begins)
        entries += [(level, x, y, min(y + rows, height), *last, number) for x in lefts for number, y in enumerate(tops)]
        first.append(len(entries))
        strips.append(len(lefts))
        chunks.append(len(tops))
    table = torch.tensor(entries, dtype=torch.int64).view(-1, PART_NUMBERS)
    return Parts(_on_device(table, device), tuple(first), tuple(strips), tuple(chunks))


class Problem:
    """The common arguments of the attention kernels, in kernel form."""

    def __init__(self, op, queries, levels, key_weight, row_bias, column_bias, values, card=None):
        images, heads, count, depth = queries.shape
        self.images, self.heads, self.count, self.depth = images, heads, count, depth
        self.sizes = tuple((level.shape[2], level.shape[3]) for level in levels)
        self.cells = sum(height * width for height, width in self.sizes)
        self.channels, self.projected, self.device = levels[0].shape[1], key_weight is not None, queries.device
        self._check(op, queries, levels, key_weight, row_bias, column_bias, values)
        self.levels, self.levels_last = in_one_order(levels)
        self.row_bias, self.column_bias = (
            [table if table.stride(3) == 1 or table.shape[3] < 2 else table.contiguous() for table in tables]
            for tables in (row_bias, column_bias)
        )
        pointers = [[from_aligned(table) for table in tables] for tables in (self.row_bias, self.column_bias)]
        self.bias_pointers = [tuple(view for view, _ in side) for side in pointers]
        self.begins = tuple(zip(*([later for _, later in side] for side in pointers)))
        dtype = levels[0].dtype
        self.queries = dense_as(queries, dtype)
        self.key_weight = None if key_weight is None else dense_as(key_weight, dtype)
        self.values, self.values_last, self.value_depth = None, False, 0
        if values is not None:
            self.values, self.values_last = in_one_order(values)
            self.value_depth = values[0].shape[1] // heads
        widest = max(self.channels, heads * self.value_depth)
        self.wide = any(height * width * widest >= NARROW_LIMIT for height, width in self.sizes)
        size = max(dtype.itemsize, 0 if values is None else values[0].dtype.itemsize)
        exact = size > 2 and precision_of(dtype) == "ieee"
        self.shape = Shape(count, self.channels, size, self.projected, self.levels_last, exact)
        self.card = card or Card.of(queries.device)

    @staticmethod
    def _check(op, queries, levels, key_weight, row_bias, column_bias, values) -> None:
        """Raise for arguments that could cause out-of-bounds accesses."""
        (images, heads, count, depth), (_, channels, *_) = queries.shape, levels[0].shape
        matches = len(row_bias) == len(column_bias) == len(levels) == len(levels if values is None else values)
        matches = matches and (
            depth == channels if key_weight is None else key_weight.shape == (heads * depth, channels)
        )
        for index, level in enumerate(levels if matches else ()):
            size = tuple(level.shape[2:])
            matches = matches and tuple(level.shape) == (images, channels, *size) and level.dtype == levels[0].dtype
            for table, side in zip((row_bias[index], column_bias[index]), size, strict=True):
                matches = (
                    matches and tuple(table.shape) == (images, heads, count, side) and table.dtype == queries.dtype
                )
            if values is not None:
                level_values = values[index]
                matches = matches and tuple(level_values.shape) == (images, values[0].shape[1], *size)
                matches = matches and level_values.shape[1] % heads == 0 and level_values.dtype == values[0].dtype
        weight = [] if key_weight is None else [key_weight]
        everything = [queries, *levels, *weight, *row_bias, *column_bias, *(values or ())]
        matches = matches and all(tensor.device == queries.device for tensor in everything)
        wide = queries.dtype == torch.float64
        matches = matches and all((tensor.dtype == torch.float64) == wide for tensor in everything)
        if not matches or queries.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{op}: arguments must fit each other in shape, dtype and device; call it through fastkd.ops, which "
                "says what does not"
            )

    def in_value_order(self, gradient: Tensor) -> Tensor:
        """The gradient of a level's values if it has the memory format that kernels write, else a new tensor."""
        order = torch.channels_last if self.values_last else torch.contiguous_format
        if gradient.is_contiguous(memory_format=order):
            return gradient
        return torch.empty_like(gradient, memory_format=order)

    def cut(self, tile: Configuration, programs: int, wanted: int) -> Parts:
        """The parts for a launch of about `wanted` programs with `programs` programs per part."""
        cells = (tile.rows, tile.columns)
        biases = tuple(
            ((*row.stride()[:3], *column.stride()[:3]), begins)
            for row, column, begins in zip(self.row_bias, self.column_bias, self.begins, strict=True)
        )
        parts = _cut(self.sizes, biases, cells, rows_of_parts(self.sizes, cells, programs, wanted), self.device)
        if self.device.type == "cuda":
            _keep(parts.table, self.device)
        return parts

    def arguments(self, parts: Parts, tile: Configuration) -> dict:
        """Kernel arguments by name."""
        return dict(
            queries=self.queries,
            key_weight=self.key_weight,
            levels=tuple(self.levels),
            row_bias=self.bias_pointers[0],
            column_bias=self.bias_pointers[1],
            table=parts.table,
            parts=parts.count,
            heads=self.heads,
            count=self.count,
            CHANNELS=self.channels,
            DEPTH=self.depth,
            PROJECTED=self.projected,
            LEVELS_LAST=self.levels_last,
            WIDE=self.wide,
            BLOCK_N=tile.queries,
            BLOCK_C=power_of_two(self.channels),
            BLOCK_D=power_of_two(self.depth),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            PRECISION=precision_of(self.levels[0].dtype),
        )

    def value_arguments(self) -> dict:
        """Additional arguments of the kernels that read values, by name."""
        return dict(
            values=None if self.values is None else tuple(self.values),
            VALUE_DEPTH=self.value_depth,
            VALUES_LAST=self.values_last,
            BLOCK_V=power_of_two(self.value_depth),
        )
