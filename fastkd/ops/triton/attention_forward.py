"""instance_attention forward on the GPU, the formulas of csrc/attention/instance_attention.cpp.

A program processes one part of the pyramid (a strip of a level, tiles.py) for a block of queries of one head, tile by
tile, with a running maximum m, sum l and output O for each query, rescaled when m grows. Keys are the cells of the
tile, or their product with the head's rows of key_weight, computed in the program. A second kernel merges the (m, l, O)
of the parts in a fixed order: deterministic.
  traffic   levels and values once from memory (the heads of a tile run concurrently and share it in the L2 cache);
            parts * queries * (d_v + 2) values written and read
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def _head_of(
    queries, key_weight, row_bias, column_bias, table, part, level, image, head, heads, count, query, x0, width,
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PROJECTED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile-independent values of a block of queries of one head."""
    known = query < count
    channel, depth = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    row = (image * heads + head) * count + query  # row of the query tables
    q = tl.load(
        queries + row[:, None] * DEPTH + depth[None, :], mask=known[:, None] & (depth < DEPTH)[None, :], other=0.0
    )
    weight = q
    if PROJECTED:
        weight = tl.load(
            key_weight + (head * DEPTH + depth)[None, :] * CHANNELS + channel[:, None],
            mask=(depth < DEPTH)[None, :] & (channel < CHANNELS)[:, None],
            other=0.0,
        )  # [C, D]
    bias_row = bias_rows(row_bias, table, part, level, image, head, query, 0)
    bias_column = column_bias_of(
        bias_rows(column_bias, table, part, level, image, head, query, 1), known, x0, width, COLUMNS
    )
    return q, weight, bias_row, bias_column


@triton.jit
def _with_tile(
    x, q, weight, bias_row, bias_column, known, value_start, value_channel, value_known, cell, inside, plane, y, y1,
    value_channels, maximum, total, output, SCALE: tl.constexpr, PROJECTED: tl.constexpr, WITH_VALUES: tl.constexpr,
    VALUES_LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and output of a head's queries, updated with a tile x [C, S] of cells."""
    number = total.dtype
    logits = tl.zeros((q.shape[0], ROWS * COLUMNS), number)
    if PROJECTED:
        key = tl.zeros((ROWS * COLUMNS, q.shape[1]), number)
        key = product(tl.trans(x), weight, key, PRECISION).to(q.dtype)
        logits = product(q, tl.trans(key), logits, PRECISION)
    else:
        logits = product(q, x, logits, PRECISION)
    logits = (logits + tile_bias(bias_row, known, bias_column, y, y1, ROWS, COLUMNS)) * SCALE
    highest = tl.maximum(maximum, tl.max(logits, axis=1))
    # If all cells were masked so far: exp(-inf - 0) = 0.
    base = tl.where(highest == -float("inf"), 0.0, highest)
    power = tl.exp(logits - base[:, None])
    factor = tl.exp(maximum - base)
    total = total * factor + tl.sum(power, axis=1)
    if WITH_VALUES:
        v = tl.load(
            value_start + map_offsets(value_channel, cell, plane, value_channels, VALUES_LAST, WIDE),
            mask=value_known[:, None] & inside[None, :],
            other=0.0,
        )  # [V, S]
        output = product(power.to(v.dtype), tl.trans(v), output * factor[:, None], PRECISION)
    return highest, total, output


@triton.jit
def _store_part(
    part_maximum, part_sum, part_output, place, known, maximum, total, output, VALUE_DEPTH: tl.constexpr,
    WITH_VALUES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    value = tl.arange(0, BLOCK_V)
    tl.store(part_maximum + place, maximum, mask=known)
    tl.store(part_sum + place, total, mask=known)
    if WITH_VALUES:
        tl.store(
            part_output + place[:, None] * VALUE_DEPTH + value[None, :],
            output,
            mask=known[:, None] & (value < VALUE_DEPTH)[None, :],
        )


@triton.jit(do_not_specialize=["parts", "heads", "count", "rows"])
def instance_attention_forward_kernel(
    queries,  # [B, G, N, DEPTH], dtype of the levels
    key_weight,  # [G * DEPTH, CHANNELS] likewise, if PROJECTED
    levels,  # L pointers to [B, CHANNELS, H, W]
    row_bias,  # L pointers to [B, G, N, H]
    column_bias,
    values,  # L pointers to [B, G * VALUE_DEPTH, H, W], if WITH_VALUES
    table,  # [parts, 16]: plan.Parts
    part_maximum,  # [parts, B * G * N]
    part_sum,
    part_output,  # [parts, B * G * N, VALUE_DEPTH]
    parts,
    heads,
    count,  # N
    rows,  # B * G * N
    SCALE: tl.constexpr,  # factor on the logits, 1 / temperature; constexpr to keep float64 precision
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUE_DEPTH: tl.constexpr,
    PROJECTED: tl.constexpr,
    WITH_VALUES: tl.constexpr,
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
    PAIR: tl.constexpr,  # a program processes two heads, which halves the reads of a tile from the L2 cache
):
    number = part_sum.dtype.element_ty
    blocks = tl.cdiv(count, BLOCK_N)
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    programs = heads // 2 if PAIR else heads
    head, place = place % programs, place // programs
    if PAIR:
        head = head * 2
    part, image = place % parts, (place // parts).to(tl.int64)
    level, x0, y0, y1, height, width = read_part(table, part)
    query = block * BLOCK_N + tl.arange(0, BLOCK_N)
    known = query < count
    channel, value = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_V)
    q, weight, bias_row, bias_column = _head_of(
        queries, key_weight, row_bias, column_bias, table, part, level, image, head, heads, count, query, x0, width,
        CHANNELS, DEPTH, PROJECTED, BLOCK_C, BLOCK_D, COLUMNS,
    )  # fmt: skip
    cells = height * width
    level_start = pick(levels, level) + image * CHANNELS * cells
    value_start = level_start
    if WITH_VALUES:
        value_start = pick(values, level) + image * heads * VALUE_DEPTH * cells
    value_channel, value_known = head * VALUE_DEPTH + value, value < VALUE_DEPTH
    maximum = tl.full((BLOCK_N,), -float("inf"), number)
    total = tl.zeros((BLOCK_N,), number)
    output = tl.zeros((BLOCK_N, BLOCK_V), number)
    if PAIR:
        q2, weight2, bias_row2, bias_column2 = _head_of(
            queries, key_weight, row_bias, column_bias, table, part, level, image, head + 1, heads, count, query, x0,
            width, CHANNELS, DEPTH, PROJECTED, BLOCK_C, BLOCK_D, COLUMNS,
        )  # fmt: skip
        maximum2, total2, output2 = maximum, total, output
    for y in range(y0, y1, ROWS):
        plane = cells_of(table, part, y, y1)
        cell, inside = tile_cells(x0, y, y1, width, ROWS, COLUMNS)
        x = tl.load(
            level_start + map_offsets(channel, cell, plane, CHANNELS, LEVELS_LAST, WIDE),
            mask=(channel < CHANNELS)[:, None] & inside[None, :],
            other=0.0,
        )  # [C, S]
        maximum, total, output = _with_tile(
            x, q, weight, bias_row, bias_column, known, value_start, value_channel, value_known, cell, inside, plane,
            y, y1, heads * VALUE_DEPTH, maximum, total, output, SCALE, PROJECTED, WITH_VALUES, VALUES_LAST, WIDE, ROWS,
            COLUMNS, PRECISION,
        )  # fmt: skip
        if PAIR:
            maximum2, total2, output2 = _with_tile(
                x, q2, weight2, bias_row2, bias_column2, known, value_start, value_channel + VALUE_DEPTH, value_known,
                cell, inside, plane, y, y1, heads * VALUE_DEPTH, maximum2, total2, output2, SCALE, PROJECTED,
                WITH_VALUES, VALUES_LAST, WIDE, ROWS, COLUMNS, PRECISION,
            )  # fmt: skip
    place = part.to(tl.int64) * rows + (image * heads + head) * count + query
    _store_part(
        part_maximum, part_sum, part_output, place, known, maximum, total, output, VALUE_DEPTH, WITH_VALUES, BLOCK_V
    )
    if PAIR:
        _store_part(
            part_maximum, part_sum, part_output, place + count, known, maximum2, total2, output2, VALUE_DEPTH,
            WITH_VALUES, BLOCK_V,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts", "rows"])
def instance_attention_merge_kernel(
    part_maximum,
    part_sum,
    part_output,
    output,  # [B * G * N, VALUE_DEPTH]
    logsumexp,  # [B * G * N]
    normal,  # [B * G * N, 2]: m, 1 / l
    parts,
    rows,
    VALUE_DEPTH: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    value = tl.arange(0, BLOCK_V)
    index = tl.arange(0, BLOCK_PARTS)
    number = part_sum.dtype.element_ty
    highest = tl.full((BLOCK_PARTS,), -float("inf"), number)
    for first in range(0, parts, BLOCK_PARTS):
        place = (first + index).to(tl.int64) * rows + row
        highest = tl.maximum(highest, tl.load(part_maximum + place, mask=first + index < parts, other=-float("inf")))
    high = tl.max(highest, axis=0)
    base = tl.where(high == -float("inf"), 0.0, high)
    total = tl.zeros((BLOCK_PARTS,), number)
    result = tl.zeros((BLOCK_PARTS, BLOCK_V), number)
    for first in range(0, parts, BLOCK_PARTS):
        known = first + index < parts
        place = (first + index).to(tl.int64) * rows + row
        factor = tl.exp(tl.load(part_maximum + place, mask=known, other=-float("inf")) - base)
        total += tl.load(part_sum + place, mask=known, other=0.0) * factor
        if WITH_VALUES:
            part = tl.load(
                part_output + place[:, None] * VALUE_DEPTH + value[None, :],
                mask=known[:, None] & (value < VALUE_DEPTH)[None, :],
                other=0.0,
            )
            result += part * factor[:, None]
    sum_of_parts = tl.sum(total, axis=0)
    tl.store(logsumexp + row, base + tl.log(sum_of_parts))
    tl.store(normal + row * 2, base)
    tl.store(normal + row * 2 + 1, 1.0 / sum_of_parts)
    if WITH_VALUES:
        tl.store(output + row * VALUE_DEPTH + value, tl.sum(result, axis=0) / sum_of_parts, mask=value < VALUE_DEPTH)


def plan_forward(
    queries: Tensor,
    levels: list[Tensor],
    key_weight: Tensor | None,
    row_bias: list[Tensor],
    column_bias: list[Tensor],
    values: list[Tensor] | None,
    scale: float = 1.0,
    card: Card | None = None,
) -> tuple[list[Launch], Tensor, Tensor, Tensor]:
    """The launches of a forward pass and their results: output, logsumexp and (m, 1 / l) of each query."""
    problem = plan.Problem("instance_attention", queries, levels, key_weight, row_bias, column_bias, values, card)
    chosen = configurations.forward(problem.shape, problem.card)
    images, heads, count, _ = queries.shape
    rows, blocks = images * heads * count, triton.cdiv(count, chosen.queries)
    sides = ((problem.value_depth,), (), (2,))
    output, logsumexp, normal = (queries.new_empty(*queries.shape[:3], *side) for side in sides)
    if not problem.cells:  # no cells
        return [], output.zero_(), logsumexp.fill_(-float("inf")), normal.zero_()
    pair = chosen.pair and heads % 2 == 0
    programs = images * heads * blocks // (2 if pair else 1)
    parts = problem.cut(chosen, programs, problem.card.wanted_programs)
    with_values = problem.value_depth > 0
    partial = [queries.new_empty(parts.count, rows, *side) for side in ((), (), (problem.value_depth,))]
    forward = Launch(
        instance_attention_forward_kernel,
        parts.count * programs,
        dict(
            **problem.arguments(parts, chosen),
            **problem.value_arguments(),
            **dict(zip(("part_maximum", "part_sum", "part_output"), partial, strict=True)),
            rows=rows,
            SCALE=float(scale),
            WITH_VALUES=with_values,
            PAIR=pair,
        ),
        chosen.warps,
        chosen.stages,
    )
    merge = Launch(
        instance_attention_merge_kernel,
        rows,
        dict(
            **dict(zip(("part_maximum", "part_sum", "part_output"), partial, strict=True)),
            output=output,
            logsumexp=logsumexp,
            normal=normal,
            parts=parts.count,
            rows=rows,
            VALUE_DEPTH=problem.value_depth,
            WITH_VALUES=with_values,
            BLOCK_V=plan.power_of_two(problem.value_depth),
            BLOCK_PARTS=32,
        ),
    )
    return [forward, merge], output, logsumexp, normal


def instance_attention(
    queries: Tensor,
    levels: list[Tensor],
    key_weight: Tensor | None,
    row_bias: list[Tensor],
    column_bias: list[Tensor],
    values: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """fastkd::instance_attention on the GPU."""
    launches, output, logsumexp, normal = plan_forward(queries, levels, key_weight, row_bias, column_bias, values)
    plan.run(launches, queries.device)
    return output, logsumexp, normal
