"""Memory traffic of the GPU kernels, launch by launch, and the PREDICTED fraction of the roofline.

benchmarks/gpu/roofline.py counts the necessary traffic of an op; this file counts the actual traffic of its kernels:
repeated passes, partial sums between launches, reads of a tile by several heads from the L2 cache. The time of a launch
is the maximum over its memory bytes, cache bytes and operations; launches run in sequence.
tests/benchmarks/test_gpu_traffic.py compares the bytes with those counted by the emulation. `python -m
benchmarks.gpu.predictions` prints the table "aim | model | met".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.roofline import Card, Work, objects_of
from benchmarks.gpu.roofline import instance_attention as least_attention
from benchmarks.ops import baselines
from benchmarks.ops.draws import Draw, Shape
from fastkd.ops.triton import configurations  # imports no Triton

# L2 bandwidth in bytes per second. A100: 5120 bytes per clock (NVIDIA A100 architecture white paper) at 1.41 GHz. The
# others are not published by NVIDIA: ASSUMED.
CACHE = {"A100": 7.2e12, "H100": 5.5e12, "RTX 4090": 5.0e12}
BANDWIDTH_AIM, ATTENTION_AIM = 0.8, 2.0
ATTENTION_QUERIES = 64
OWN_AIMS = ("instance_attention", "imitation_mask")  # aims: twice the limits; none, as it is bound by operations
FORWARD, BACKWARD = configurations.forward, configurations.backward


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, or of torch's matrix products between kernels.

    Args:
        name: of the kernel.
        read, written: bytes, each counted once per launch.
        cache: bytes read from the L2 cache, if more.
        matrix, scalar: operations as in roofline.Work.
    """

    name: str
    read: float
    written: float
    cache: float = 0
    matrix: float = 0
    scalar: float = 0

    def seconds(self, card: Card, half: bool = True) -> float:
        """PREDICTED."""
        moved = Work(int(self.read + self.written), int(self.matrix), int(self.scalar)).seconds(card, half)
        return max(moved, self.cache / CACHE[card.name])


@dataclass(frozen=True)
class Cover:
    """Coverage of drawn boxes (or ellipses in them), as fractions of a pyramid's cells.

    Args:
        once: cells in some object, in memory sectors of 32 bytes.
        each: sum of the cells of all objects.
        parts: overlapping (strip, object) pairs times channels, the number of partial sums.
    """

    once: float
    each: float
    parts: int


@functools.cache
def cover_of(shape: Shape, size: int, last: bool, strip: Callable[[int, int], int]) -> Cover:
    """Coverage of the drawn boxes. Args: strip: (rows, columns) of a level -> cells of a strip."""
    draw = Draw(shape, torch.bfloat16 if size == 2 else torch.float32, last, torch.device("cpu"))
    boxes, _ = draw.boxes()
    line, once, each, parts = 1 if last else 32 // size, 0, 0, 0
    for rows, columns in shape.level_sizes:
        cover = baselines.box_cover(boxes, shape.image_size, (rows, columns)).flatten(1)
        each += int(cover.sum())
        some = cover.unflatten(0, (shape.images, -1)).any(1)
        some = torch.nn.functional.pad(some, (0, -some.shape[1] % line)).unflatten(1, (-1, line))
        once += min(line * int(some.any(2).sum()), shape.images * rows * columns)
        cells = torch.arange(rows * columns)
        first = torch.where(cover, cells, rows * columns).amin(1) // strip(rows, columns)
        final = torch.where(cover, cells, -1).amax(1) // strip(rows, columns)
        parts += int((final - first + 1)[cover.any(1)].sum())
    whole = shape.images * shape.cells
    return Cover(once / whole, each / whole, parts * shape.channels)


def _strip(rows: int, columns: int) -> int:
    return 512


def _whole_rows(rows: int, columns: int) -> int:
    return max(1, 512 // columns) * columns


def instance_norm_mse(shape: Shape, size: int, last: bool) -> list[Launch]:
    moved = shape.elements * size
    rows = len(shape.strides) * shape.images * shape.channels
    if not last:
        return [
            # Two launches where some rows are long and others are not: the same bytes.
            Launch("forward_rows_kernel", 2 * moved, 48 * rows, scalar=28 * shape.elements),
            Launch("sum_rows_kernel", 8 * rows, 4),
            Launch("backward_rows_kernel", 2 * moved + 40 * rows, moved, scalar=16 * shape.elements),
        ]
    chunks = sum(-(-high * wide // 128) for high, wide in shape.level_sizes) * shape.images * shape.channels
    return [
        Launch("chunk_moments_kernel", 2 * moved, 28 * chunks, 4 * moved, scalar=16 * shape.elements),
        Launch("merge_moments_kernel", 28 * chunks, 48 * rows),
        Launch("chunk_errors_kernel", 8 * rows, 0),  # no rows to recompute unless the sides are nearly equal
        Launch("merge_errors_kernel", 8 * rows, 0),
        Launch("sum_rows_kernel", 8 * rows, 4),
        Launch("backward_chunks_kernel", 2 * moved + 40 * rows, moved, scalar=16 * shape.elements),
    ]


def _pool(shape: Shape, size: int, last: bool, rows: int = 1) -> list[Launch]:
    """Launches of pooling with `rows` sums per object."""
    cover = cover_of(shape, size, last, _strip)
    share, sums = (1.0 if rows > 1 else cover.once), 4 * rows * cover.parts
    moved, out = shape.elements * size, objects_of(shape) * rows * (size if rows == 1 else 4)
    return [
        Launch("pool_kernel", share * moved, sums, scalar=(1 + cover.each) * shape.elements),
        Launch("merge_kernel", sums, out),
    ]


def _paint(shape: Shape, size: int, rows: int = 1) -> Launch:
    values = objects_of(shape) * rows * (size if rows == 1 else 4)
    return Launch("paint_kernel", values, shape.elements * size, scalar=2 * shape.elements)


def box_pool(shape: Shape, size: int, last: bool) -> list[Launch]:
    return [*_pool(shape, size, last), _paint(shape, size)]


def box_paint(shape: Shape, size: int, last: bool) -> list[Launch]:
    return [_paint(shape, size), *_pool(shape, size, last)]


def box_paint_conv3x3(shape: Shape, size: int, last: bool) -> list[Launch]:
    taps, products = 9 * objects_of(shape), 2 * 9 * objects_of(shape) * shape.channels
    weights = 9 * shape.channels**2 * size
    strips = sum(-(-high * wide // 512) for high, wide in shape.level_sizes)
    whole = 4 * strips * shape.images * shape.channels
    return [
        Launch("matmul", weights, 4 * taps, scalar=products),
        _paint(shape, size, 9),
        *_pool(shape, size, last, 9),
        Launch("bias_kernel", whole, 4 * shape.channels),
        Launch("matmul", 4 * taps, weights, scalar=2 * products),
    ]


def norm_relu_box_pool(shape: Shape, size: int, last: bool) -> list[Launch]:
    moved, numbers = shape.elements * size, objects_of(shape)
    cover = cover_of(shape, size, last, _whole_rows)
    sums = 2 * 4 * cover.parts
    return [
        Launch("moments_kernel", moved, 0, scalar=8 * shape.elements),
        Launch("pool kernels", cover.once * moved, sums, cover.each * moved, scalar=4 * cover.each * shape.elements),
        Launch("pooled_kernel", sums, numbers * (size + 8)),
        Launch("weigh_kernel", numbers * (size + 8), 4 * numbers),
        Launch("backward kernels", moved + 4 * numbers, moved, scalar=8 * shape.elements),
    ]


def value_mimic(shape: Shape, size: int, last: bool) -> list[Launch]:
    moved, mass = shape.elements * size, 4 * shape.images * shape.heads * shape.cells
    return [
        Launch("forward_kernel", 2 * moved + mass, 0, scalar=16 * shape.elements),
        Launch("backward_kernel", 2 * moved + mass, moved, scalar=24 * shape.elements),
    ]


def masked_mse(shape: Shape, size: int, last: bool) -> list[Launch]:
    moved, flags = shape.elements * size, shape.images * shape.cells
    share = 1 / 6 if last else 1 - (5 / 6) ** (32 // size)  # of sectors of 32 bytes with a masked cell
    return [
        Launch("forward_kernel", share * 2 * moved + flags, 0, scalar=3 * shape.elements / 6),
        Launch("backward_kernel", share * 2 * moved + flags, moved, scalar=3 * shape.elements / 6),
    ]


def _pack(shape: Shape) -> list[Launch]:
    """Reads of mask pixels: every eighth row for the first level and so on, in sectors of 32 bytes."""
    pixels = shape.images * shape.boxes * shape.height * shape.width
    words = shape.boxes * shape.images * shape.cells // 8
    return [Launch("pack_masks_kernel", sum(pixels / max(stride, 1) for stride in shape.strides), words)]


def mask_pool(shape: Shape, size: int, last: bool) -> list[Launch]:
    return [*_pack(shape), *_pool(shape, size, last), *_pack(shape), _paint(shape, size)]


def mask_paint(shape: Shape, size: int, last: bool) -> list[Launch]:
    return [*_pack(shape), _paint(shape, size), *_pack(shape), *_pool(shape, size, last)]


def _absorbed(shape: Shape, count: int) -> bool:
    """As instance_attention.absorbing_is_cheaper on a GPU."""
    return count <= configurations.FEW and shape.heads * count * shape.channels < shape.channels * (
        shape.channels + count
    )


def _tile(kernel: Callable, shape: Shape, size: int, last: bool, count: int) -> configurations.Configuration:
    """The configuration for an H100; those of other cards differ little."""
    form = configurations.Shape(count, shape.channels, size, not _absorbed(shape, count), last)
    return kernel(form, configurations.Card(9, 132))


def _strips(shape: Shape, tile: configurations.Configuration) -> list[int]:
    """Strips of each level; a part is a whole strip, as heads and images alone fill the card here."""
    return [-(-columns // tile.columns) for _, columns in shape.level_sizes]


def _loop_over_blocks(shape: Shape, tile: configurations.Configuration, padded: int, depth: int, size: int) -> int:
    """Bytes per image that the backward pass reads again, or adds to, for every tile if it loops over queries."""
    if tile.single:
        return 0
    tiles = sum(-(-rows // tile.rows) * -(-columns // tile.columns) for rows, columns in shape.level_sizes)
    sums = 8 * (depth + tile.columns)  # gradients of a query and of its column biases, read and written
    operands = (2 * size + 4) * depth + 4 * tile.columns  # query, gradient of the output, output; column biases
    return shape.heads * tiles * padded * (sums + operands)


def instance_attention(shape: Shape, size: int, last: bool) -> list[Launch]:
    """One program per head or pair of heads; each reads all channels of its tiles, from the cache after the first."""
    moved, channels, count = shape.elements * size, shape.channels, shape.queries
    cells, depth = shape.images * shape.cells, shape.channels // shape.heads
    queries = shape.images * shape.heads * count
    forward, backward = (_tile(kernel, shape, size, last, count) for kernel in (FORWARD, BACKWARD))
    padded = -(-count // forward.queries) * forward.queries  # matrix instructions multiply whole blocks
    absorbed = _absorbed(shape, count)
    keys = 0 if absorbed else channels * channels
    logits = shape.heads * padded * channels if absorbed else padded * channels
    reads, pairs = (shape.heads + 1) * moved, (shape.heads / (2 if forward.pair else 1) + 1) * moved
    to_queries = logits + (0 if absorbed else channels * channels + padded * channels)
    backwards = keys + logits + 2 * padded * channels + to_queries
    softmax = 8 * shape.heads * padded * cells
    tables = 4 * queries * sum(rows + columns for rows, columns in shape.level_sizes)
    partial = 4 * sum(_strips(shape, forward)) * queries * (depth + 2)
    strips = _strips(shape, backward)
    # Partial sums: queries and key_weight per strip, row tables if a level has several strips; others are complete.
    rows_of = [(number, rows) for number, (rows, _) in zip(strips, shape.level_sizes, strict=True)]
    small = queries * (channels if absorbed else depth)
    parts = 4 * sum(strips) * (small + shape.images * keys)
    parts += 4 * queries * sum(number * rows for number, rows in rows_of if number > 1)
    whole = 4 * (small + keys + queries * sum(rows for number, rows in rows_of if number > 1))
    complete = 4 * queries * sum(columns for _, columns in shape.level_sizes)
    complete += 4 * queries * sum(rows for number, rows in rows_of if number == 1)
    into_forward = keys + logits + padded * channels
    reads += shape.images * _loop_over_blocks(shape, backward, padded, depth, size)
    return [
        Launch("forward_kernel", 2 * moved + tables, partial, pairs, 2 * cells * into_forward, softmax),
        Launch("merge_kernel", partial, 4 * queries * (depth + 3)),
        Launch("backward_kernel", 2 * moved + tables, moved + parts + complete, reads, 2 * cells * backwards, softmax),
        Launch("backward_merge_kernel", parts, whole),
    ]


def attention_mass(shape: Shape, size: int, last: bool) -> list[Launch]:
    """One program per tile, which reads the queries of all heads (and key_weight) from the cache."""
    moved, channels, count = shape.elements * size, shape.channels, shape.real
    tile, absorbed = _tile(configurations.mass, shape, size, last, count), _absorbed(shape, count)
    padded = -(-count // tile.queries) * tile.queries
    tiles = sum(-(-rows // tile.rows) * -(-columns // tile.columns) for rows, columns in shape.level_sizes)
    operands = size * (shape.heads * count * channels if absorbed else channels * (channels + count))
    tables = 4 * shape.heads * count * sum(rows + columns for rows, columns in shape.level_sizes)
    products = shape.heads * padded * channels if absorbed else channels * (channels + padded)
    mass, cells = shape.images * shape.heads * shape.cells, shape.images * shape.cells
    cache = moved + shape.images * tiles * operands
    read = moved + shape.images * (operands + tables)
    return [Launch("mass_kernel", read, 4 * mass, cache, 2 * cells * products, 4 * padded * mass)]


def imitation_mask(shape: Shape, size: int, last: bool) -> list[Launch]:
    """Upper bound with every anchor of every cell; the kernels test only where box and anchor can overlap."""
    boxes, pairs = shape.images * shape.boxes, shape.anchors * len(shape.strides)
    overlaps = boxes * shape.cells * shape.anchors
    sides, best = 16 * (boxes + pairs), 4 * boxes * pairs
    return [
        Launch("best_kernel", sides, best, scalar=14 * overlaps),
        Launch("threshold_kernel", best, 4 * boxes),
        Launch("mark_kernel", sides + best + 12 * boxes, shape.images * shape.cells, scalar=14 * overlaps),
    ]


MODELS = {
    model.__name__: model
    for model in (
        instance_norm_mse, box_pool, box_paint, box_paint_conv3x3, norm_relu_box_pool, value_mimic, masked_mse,
        mask_pool, mask_paint, instance_attention, attention_mass, imitation_mask,
    )
}  # fmt: skip


def least(name: str, shape: Shape, size: int, last: bool) -> float:
    """Necessary bytes of an op: each tensor read and written once; only covered or masked cells where applicable.

    The launches of MODELS without repeated reads and partial sums.
    """
    moved, mass = shape.elements * size, 4 * shape.images * shape.heads * shape.cells
    if name in ("instance_norm_mse", "value_mimic"):
        return 5 * moved + (2 * mass if name == "value_mimic" else 0)
    if name == "masked_mse":
        return sum(launch.read + launch.written for launch in masked_mse(shape, size, last))
    if name == "attention_mass":
        return moved + mass
    covered = cover_of(shape, size, last, _strip).once * moved
    values = 2 * objects_of(shape) * size
    if name == "norm_relu_box_pool":
        return 3 * moved + covered + values
    if name == "box_paint_conv3x3":
        return 2 * moved + values + 2 * 9 * shape.channels**2 * size
    pixels = shape.images * shape.boxes * shape.height * shape.width / min(shape.strides)
    return moved + covered + values + (2 * pixels if name.startswith("mask") else 0)


def aims(shape: Shape, card: Card, size: int = 2) -> list[str]:
    """The table "aim | model | met" on a card; all of it PREDICTED."""
    lines = [
        f"PREDICTED on {card.name}, nothing measured: bytes-only time of the least traffic / time of the kernels' own "
        f"traffic, launch by launch (benchmarks/gpu/traffic.py); L2 cache taken as {CACHE[card.name] / 1e12:.1f} TB/s",
        "| op | memory order | least MB | moved MB | ideal ms | model ms | aim | model | met |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        if name in OWN_AIMS:
            continue
        for last in (False, True):
            launches, bytes_least = model(shape, size, last), least(name, shape, size, last)
            moved = sum(launch.read + launch.written for launch in launches)
            ideal, time = bytes_least / card.bandwidth, sum(launch.seconds(card, size == 2) for launch in launches)
            cells = (f"{bytes_least / 1e6:.0f}", f"{moved / 1e6:.0f}", f"{1e3 * ideal:.3f}", f"{1e3 * time:.3f}")
            met = "yes" if ideal >= BANDWIDTH_AIM * time else "NO"
            order = "channels-last" if last else "contiguous"
            lines.append(
                f"| {name} | {order} | {' | '.join(cells)} | >= {BANDWIDTH_AIM:.0%} | {ideal / time:.0%} | {met} |"
            )
    shape = dataclasses.replace(shape, queries=ATTENTION_QUERIES)
    ideal = least_attention(shape, size).seconds(card, size == 2)
    for last in (False, True):
        launches = instance_attention(shape, size, last)
        time = sum(launch.seconds(card, size == 2) for launch in launches)
        moved = sum(launch.read + launch.written for launch in launches)
        cells = (f"{least_attention(shape, size).bytes / 1e6:.0f}", f"{moved / 1e6:.0f}", f"{1e3 * ideal:.3f}")
        lines.append(
            f"| instance_attention, N = {shape.queries} | {'channels-last' if last else 'contiguous'} | "
            f"{' | '.join(cells)} | {1e3 * time:.3f} | <= {ATTENTION_AIM:.0f} x | {time / ideal:.2f} x | "
            f"{'yes' if time <= ATTENTION_AIM * ideal else 'NO'} |"
        )
    return lines
