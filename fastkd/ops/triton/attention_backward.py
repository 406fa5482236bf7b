"""instance_attention backward on the GPU, the formulas of csrc/attention/instance_attention.cpp.

A program processes a strip of a level (tiles.py) for one head of one image, tile by tile, and recomputes P:
  P = exp(logits - m) / l, dV = P^T dO, dP = dO V, dS = P (dP - D), D = dO . O;
  dQ = dS K^T, column and row biases' gradients = dS over the tile's rows and columns, dK = dS^T Q, dW = dK x^T
With SINGLE all queries form one block, whose sums stay in registers; otherwise the program accumulates the sums of each
block in memory, tile by tile (with WEIGHT_IN_MEMORY also those of dW). dV is complete after a tile. A second kernel
reduces the partial sums of all gradients in one launch and a fixed order, without atomics: deterministic.
  traffic   levels and values are read once from memory (the heads of a tile run concurrently and share it in the L2
            cache), dV is written once; each part writes d values per query and, if PROJECTED, a weight gradient
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastkd.ops._support.registration import dense_like
from fastkd.ops.triton import configurations, plan
from fastkd.ops.triton.configurations import Card
from fastkd.ops.triton.plan import Launch
from fastkd.ops.triton.tiles import (
    bias_rows,
    cells_of,
    column_bias_of,
    map_offsets,
    pick,
    product,
    read_part,
    tile_bias,
    tile_cells,
)

MERGED = 128  # output elements of one program of the merge kernel


@triton.jit
def _block(
    queries, row_bias, column_bias, grad, output, normal, table, part, level, image, head, heads, first, count, x0,
    width, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile-independent values of a block of queries."""
    query = first + tl.arange(0, BLOCK_N)
    known = query < count
    depth, value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    row = (image * heads + head) * count + query
    q = tl.load(
        queries + row[:, None] * DEPTH + depth[None, :], mask=known[:, None] & (depth < DEPTH)[None, :], other=0.0
    )
    values_known = known[:, None] & (value < VALUE_DEPTH)[None, :]
    value_place = row[:, None] * VALUE_DEPTH + value[None, :]
    do = tl.load(grad + value_place, mask=values_known, other=0.0)
    out = tl.load(output + value_place, mask=values_known, other=0.0)
    delta = tl.sum(do.to(out.dtype) * out, axis=1)
    maximum = tl.load(normal + row * 2, mask=known, other=0.0)
    factor = tl.load(normal + row * 2 + 1, mask=known, other=0.0)
    row_pointers = bias_rows(row_bias, table, part, level, image, head, query, 0)
    column_pointers = bias_rows(column_bias, table, part, level, image, head, query, 1)
    columns = column_bias_of(column_pointers, known, x0, width, COLUMNS)
    return row, known, q, do, delta, maximum, factor, row_pointers, columns


@triton.jit
def _probabilities(q, key, bias, maximum, factor, PRECISION: tl.constexpr):
    """P [N, S] of a tile's keys [D, S]."""
    logits = product(q, key, tl.zeros((q.shape[0], key.shape[1]), maximum.dtype), PRECISION) + bias
    return tl.exp(logits - maximum[:, None]) * factor[:, None]


@triton.jit
def _slopes(power, do, v, delta, PRECISION: tl.constexpr):
    """dS [N, S]."""
    dp = product(do, v, tl.zeros((do.shape[0], v.shape[1]), delta.dtype), PRECISION)
    return power * (dp - delta[:, None])


@triton.jit(do_not_specialize=["parts", "heads", "count", "rows"])
def instance_attention_backward_kernel(
    queries,  # [B, G, N, DEPTH], dtype of the levels
    key_weight,  # [G * DEPTH, CHANNELS] likewise, if PROJECTED
    levels,  # L pointers to [B, CHANNELS, H, W]
    row_bias,  # L pointers to [B, G, N, H]
    column_bias,
    values,  # L pointers to [B, G * VALUE_DEPTH, H, W]
    grad,  # [B, G, N, VALUE_DEPTH], dtype of the values
    output,  # [B, G, N, VALUE_DEPTH]
    normal,  # [B, G, N, 2]: m, 1 / l
    table,  # [parts, 16]: plan.Parts
    part_queries,  # [parts, B * G * N, DEPTH]
    part_weight,  # [B * parts, G * DEPTH, CHANNELS], if PROJECTED
    part_rows,  # L pointers to [strips, B * G * N, H]
    part_columns,  # L pointers to [parts of a strip, B * G * N, W]
    grad_values,  # L pointers, shapes as values
    parts,
    heads,
    count,  # N
    rows,  # B * G * N
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUE_DEPTH: tl.constexpr,
    PROJECTED: tl.constexpr,
    FOR_KEYS: tl.constexpr,
    FOR_VALUES: tl.constexpr,
    SINGLE: tl.constexpr,
    WEIGHT_IN_MEMORY: tl.constexpr,  # accumulate the gradient of the weight in memory, not in registers
    LEVELS_LAST: tl.constexpr,  # channels-last
    VALUES_LAST: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets within an image
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, place = tl.program_id(0) % heads, tl.program_id(0) // heads
    part, image = place % parts, (place // parts).to(tl.int64)
    level, x0, y0, y1, height, width = read_part(table, part)
    channel, depth, value = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    number = normal.dtype.element_ty
    cells = height * width
    level_start = pick(levels, level) + image * CHANNELS * cells
    value_place = image * heads * VALUE_DEPTH * cells
    value_start = pick(values, level) + value_place
    value_channel = head * VALUE_DEPTH + value
    if FOR_VALUES:
        grad_value_start = pick(grad_values, level) + value_place
    if FOR_KEYS:
        row_start = pick(part_rows, level) + (x0 // COLUMNS).to(tl.int64) * rows * height
        chunk = tl.load(table + part * 16 + 15)
        column_start = pick(part_columns, level) + chunk * rows * width
        column = x0 + tl.arange(0, COLUMNS)
        queries_start = part_queries + part.to(tl.int64) * rows * DEPTH
    if PROJECTED:
        weight_place = (head * DEPTH + depth)[None, :] * CHANNELS + channel[:, None]
        weight_known = (depth < DEPTH)[None, :] & (channel < CHANNELS)[:, None]
        weight = tl.load(key_weight + weight_place, mask=weight_known, other=0.0)  # [C, D]
        part_start = part_weight
        if FOR_KEYS:
            part_start = part_weight + (image * parts + part) * heads * DEPTH * CHANNELS
        if not WEIGHT_IN_MEMORY:
            grad_weight = tl.zeros((BLOCK_C, BLOCK_D), number)
    if SINGLE:
        row, known, q, do, delta, maximum, factor, bias_row, bias_column = _block(
            queries, row_bias, column_bias, grad, output, normal, table, part, level, image, head, heads, 0, count, x0,
            width, DEPTH, VALUE_DEPTH, BLOCK_N, BLOCK_D, BLOCK_V, COLUMNS,
        )  # fmt: skip
        grad_query = tl.zeros((BLOCK_N, BLOCK_D), number)
        grad_column = tl.zeros((BLOCK_N, COLUMNS), number)
    for y in range(y0, y1, ROWS):
        plane = cells_of(table, part, y, y1)
        cell, inside = tile_cells(x0, y, y1, width, ROWS, COLUMNS)
        y_of_tile = y + tl.arange(0, ROWS)
        x = tl.load(
            level_start + map_offsets(channel, cell, plane, CHANNELS, LEVELS_LAST, WIDE),
            mask=(channel < CHANNELS)[:, None] & inside[None, :],
            other=0.0,
        )  # [C, S]
        value_offsets = map_offsets(value_channel, cell, plane, heads * VALUE_DEPTH, VALUES_LAST, WIDE)
        value_known = (value < VALUE_DEPTH)[:, None] & inside[None, :]
        if FOR_KEYS:
            v = tl.load(value_start + value_offsets, mask=value_known, other=0.0)  # [V, S]
        if PROJECTED:
            key_by_cell = tl.zeros((ROWS * COLUMNS, BLOCK_D), number)
            key_by_cell = product(tl.trans(x), weight, key_by_cell, PRECISION).to(x.dtype)
            key = tl.trans(key_by_cell)
            grad_key = tl.zeros((ROWS * COLUMNS, BLOCK_D), number)
        else:
            key_by_cell = tl.trans(x)
            key = x
        grad_value = tl.zeros((ROWS * COLUMNS, BLOCK_V), number)
        if SINGLE:
            bias = tile_bias(bias_row, known, bias_column, y, y1, ROWS, COLUMNS)
            power = _probabilities(q, key, bias, maximum, factor, PRECISION)
            if FOR_VALUES:
                grad_value = product(tl.trans(power.to(do.dtype)), do, grad_value, PRECISION)
            if FOR_KEYS:
                slope = _slopes(power, do, v, delta, PRECISION)
                grad_query = product(slope.to(x.dtype), key_by_cell, grad_query, PRECISION)
                if PROJECTED:
                    grad_key = product(tl.trans(slope.to(x.dtype)), q, grad_key, PRECISION)
                by_place = tl.reshape(slope, (BLOCK_N, ROWS, COLUMNS))
                grad_column += tl.sum(by_place, axis=1)
                tl.store(
                    row_start + row[:, None] * height + y_of_tile[None, :],
                    tl.sum(by_place, axis=2),
                    mask=known[:, None] & (y_of_tile < y1)[None, :],
                )
        else:
            for first in range(0, count, BLOCK_N):
                row, known, q, do, delta, maximum, factor, bias_row, bias_column = _block(
                    queries, row_bias, column_bias, grad, output, normal, table, part, level, image, head, heads, first,
                    count, x0, width, DEPTH, VALUE_DEPTH, BLOCK_N, BLOCK_D, BLOCK_V, COLUMNS,
                )  # fmt: skip
                bias = tile_bias(bias_row, known, bias_column, y, y1, ROWS, COLUMNS)
                power = _probabilities(q, key, bias, maximum, factor, PRECISION)
                if FOR_VALUES:
                    grad_value = product(tl.trans(power.to(do.dtype)), do, grad_value, PRECISION)
                if FOR_KEYS:
                    slope = _slopes(power, do, v, delta, PRECISION)
                    if PROJECTED:
                        grad_key = product(tl.trans(slope.to(x.dtype)), q, grad_key, PRECISION)
                    by_place = tl.reshape(slope, (BLOCK_N, ROWS, COLUMNS))
                    tl.store(
                        row_start + row[:, None] * height + y_of_tile[None, :],
                        tl.sum(by_place, axis=2),
                        mask=known[:, None] & (y_of_tile < y1)[None, :],
                    )
                    # The sums over the previous tiles of the strip, written by this program.
                    query_offset = queries_start + row[:, None] * DEPTH + depth[None, :]
                    query_known = known[:, None] & (depth < DEPTH)[None, :]
                    sums = tl.load(query_offset, mask=query_known & (y > y0), other=0.0)
                    sums = product(slope.to(x.dtype), key_by_cell, sums, PRECISION)
                    tl.store(query_offset, sums, mask=query_known)
                    column_offset = column_start + row[:, None] * width + column[None, :]
                    column_known = known[:, None] & (column < width)[None, :]
                    column_sums = tl.load(column_offset, mask=column_known & (y > y0), other=0.0)
                    tl.store(column_offset, column_sums + tl.sum(by_place, axis=1), mask=column_known)
            tl.debug_barrier()  # the next tile reads values written by other threads of the program
        if FOR_VALUES:
            tl.store(
                grad_value_start + tl.trans(value_offsets),
                grad_value.to(grad_values[0].dtype.element_ty),
                mask=tl.trans(value_known),
            )
        if PROJECTED and FOR_KEYS:
            if WEIGHT_IN_MEMORY:
                sums = tl.load(part_start + weight_place, mask=weight_known & (y > y0), other=0.0)
                sums = product(x, grad_key.to(x.dtype), sums, PRECISION)
                tl.store(part_start + weight_place, sums, mask=weight_known)
                tl.debug_barrier()  # as above
            else:
                grad_weight = product(x, grad_key.to(x.dtype), grad_weight, PRECISION)
    if FOR_KEYS:
        if SINGLE:
            tl.store(
                queries_start + row[:, None] * DEPTH + depth[None, :],
                grad_query,
                mask=known[:, None] & (depth < DEPTH)[None, :],
            )
            tl.store(
                column_start + row[:, None] * width + column[None, :],
                grad_column,
                mask=known[:, None] & (column < width)[None, :],
            )
        if PROJECTED and not WEIGHT_IN_MEMORY:
            tl.store(part_start + weight_place, grad_weight, mask=weight_known)


@triton.jit
def instance_attention_backward_merge_kernel(
    parts,  # pointers to [parts of a group, elements of a part]
    sums,  # pointers to the sums over the first dimension, possibly in a narrower type
    table,  # [groups, 2]: parts of a group, elements of a part / UNIT; 0 elements: nothing to reduce
    UNIT: tl.constexpr,  # 4 if all parts begin at multiples of 4 elements, for 16-byte loads
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    for index in tl.static_range(len(parts)):
        count = tl.load(table + 2 * index).to(tl.int32)
        numbers = tl.load(table + 2 * index + 1) * UNIT
        blocks = tl.cdiv(numbers, BLOCK)
        if (block >= 0) & (block < blocks):
            place = block * BLOCK + tl.arange(0, BLOCK)
            part = tl.arange(0, BLOCK_PARTS)
            total = tl.zeros((BLOCK_PARTS, BLOCK), parts[0].dtype.element_ty)
            for first in range(0, count, BLOCK_PARTS):
                known = (first + part < count)[:, None] & (place < numbers)[None, :]
                offset = (first + part).to(tl.int64)[:, None] * numbers + place[None, :]
                total += tl.load(parts[index] + offset, mask=known, other=0.0)
            tl.store(sums[index] + place, tl.sum(total, axis=0), mask=place < numbers)
        block -= blocks


def plan_backward(
    grad: Tensor,
    output: Tensor,
    normal: Tensor,
    queries: Tensor,
    levels: list[Tensor],
    key_weight: Tensor | None,
    row_bias: list[Tensor],
    column_bias: list[Tensor],
    values: list[Tensor],
    for_keys: bool,
    for_values: bool,
    card: Card | None = None,
) -> tuple[list[Launch], Callable[[], list[Tensor]]]:
    """The launches of a backward pass, and a function that collects its results."""
    op = "instance_attention_backward"
    problem = plan.Problem(op, queries, levels, key_weight, row_bias, column_bias, values, card)
    images, heads, count, depth = queries.shape
    rows, tables = images * heads * count, (images, heads, count)
    plan.check_like(op, queries, (*tables, problem.value_depth), grad=grad, output=output)
    plan.check_like(op, queries, (*tables, 2), normal=normal)
    chosen = configurations.backward(problem.shape, problem.card)
    # A program occupies a whole multiprocessor, and each part has partial sums in memory: just enough to fill the GPU.
    parts = problem.cut(chosen, images * heads, 2 * problem.card.processors)
    part_queries = queries.new_empty(parts.count, rows, depth) if for_keys else None
    part_weight = None
    if for_keys and problem.projected:
        part_weight = queries.new_empty(images * parts.count, heads * depth, problem.channels)
    sides = [] if not for_keys else problem.sizes
    part_rows = [queries.new_empty(n, rows, size[0]) for n, size in zip(parts.strips, sides)]
    part_columns = [queries.new_empty(n, rows, size[1]) for n, size in zip(parts.chunks, sides)]
    grad_values = [dense_like(value) for value in values] if for_values else []
    written = [problem.in_value_order(one) for one in grad_values]
    launch = Launch(
        instance_attention_backward_kernel,
        parts.count * images * heads,
        dict(
            **problem.arguments(parts, chosen),
            **problem.value_arguments(),
            grad=plan.dense_as(grad, values[0].dtype),
            output=plan.dense_as(output, queries.dtype),
            normal=plan.dense_as(normal, queries.dtype),
            part_queries=part_queries,
            part_weight=part_weight,
            part_rows=tuple(part_rows) if for_keys else None,
            part_columns=tuple(part_columns) if for_keys else None,
            grad_values=tuple(written) if for_values else None,
            rows=rows,
            FOR_KEYS=for_keys,
            FOR_VALUES=for_values,
            SINGLE=chosen.single,
            WEIGHT_IN_MEMORY=chosen.sums_in_memory,
        ),
        chosen.warps,
        chosen.stages,
    )

    groups: list[tuple[Tensor, Sequence[int]]] = []
    if part_queries is not None:
        groups.append((part_queries, queries.shape))
        groups += [(part, table.shape) for part, table in zip(part_rows, row_bias)]
        groups += [(part, table.shape) for part, table in zip(part_columns, column_bias)]
    if part_weight is not None and key_weight is not None:
        groups.append((part_weight, key_weight.shape))
    merge, sums = plan_merge(groups)

    def gather() -> list[Tensor]:
        for one, source in zip(grad_values, written, strict=True):
            if one is not source:
                one.copy_(source)
        if not for_keys:
            return grad_values
        weight = [sums.pop()] if problem.projected else []
        return [sums[0], *weight, *sums[1:], *grad_values]

    return [launch, *merge], gather


def plan_merge(groups: Sequence[tuple[Tensor, Sequence[int]]]) -> tuple[list[Launch], list[Tensor]]:
    """The launch that sums the parts of all groups, and the sums; a group of one part needs no sum.

    All groups are passed to the kernel, those of one part with 0 elements, so that it is compiled once and not for each
    set of groups with several parts.

    Args:
        groups: parts [P, ...] and the shape of the sum.
    """
    parts = [one for one, _ in groups]
    sums = [one.view(shape) if len(one) == 1 else one.new_empty(shape) for one, shape in groups]
    numbers = [0 if len(one) == 1 else total.numel() for one, total in zip(parts, sums)]
    if not any(numbers):
        return [], sums
    unit = 1 if any(number % 4 for number in numbers) else 4
    arguments = dict(
        parts=tuple(parts),
        sums=tuple(sums),
        table=plan.table_of([(len(one), many // unit) for one, many in zip(parts, numbers)], sums[0].device),
        UNIT=unit,
        BLOCK=MERGED,
        BLOCK_PARTS=16,
    )
    programs = sum(triton.cdiv(number, MERGED) for number in numbers)
    return [Launch(instance_attention_backward_merge_kernel, programs, arguments)], sums


def instance_attention_backward(*arguments) -> list[Tensor]:
    """fastkd::instance_attention_backward on the GPU."""
    launches, gather = plan_backward(*arguments)
    plan.run(launches, arguments[0].device)
    return gather()
