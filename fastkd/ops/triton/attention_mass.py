"""attention_mass on the GPU: sum over the chosen queries of exp(logits / T - logsumexp), per head and cell.

A program processes some tiles of cells of one image (tiles.py); for each tile it loops over all heads and blocks of
queries. A tile is read once, the queries come from the L2 cache. Each sum is complete in one program: no second pass
and no atomics.
  traffic   levels once, the mass written once; queries * CHANNELS (or key_weight) once per tile, from the L2 cache
Without a given logsumexp, the forward kernels compute it first, without values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.ops.triton import configurations, plan
from fastkd.ops.triton.attention_forward import plan_forward
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


@triton.jit(do_not_specialize=["parts", "heads", "count"])
def attention_mass_kernel(
    queries,  # [B, G, N, DEPTH], dtype of the levels
    key_weight,  # [G * DEPTH, CHANNELS] likewise, if PROJECTED
    levels,  # L pointers to [B, CHANNELS, H, W]
    row_bias,  # L pointers to [B, G, N, H]
    column_bias,
    chosen,  # [B, N] uint8
    logsumexp,  # [B, G, N]
    table,  # [parts, 16]: plan.Parts
    mass,  # L pointers to [B, G, H, W]
    parts,
    heads,
    count,  # N
    SCALE: tl.constexpr,  # factor on the logits, 1 / temperature
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    PROJECTED: tl.constexpr,
    LEVELS_LAST: tl.constexpr,  # channels-last
    WIDE: tl.constexpr,  # 64-bit offsets within an image
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part, image = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    level, x0, y0, y1, height, width = read_part(table, part)
    channel, depth = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    number = logsumexp.dtype.element_ty
    cells = height * width
    level_start = pick(levels, level) + image * CHANNELS * cells
    mass_start = pick(mass, level) + image * heads * cells
    blocks = tl.cdiv(count, BLOCK_N)
    for y in range(y0, y1, ROWS):
        plane = cells_of(table, part, y, y1)
        cell, inside = tile_cells(x0, y, y1, width, ROWS, COLUMNS)
        x = tl.load(
            level_start + map_offsets(channel, cell, plane, CHANNELS, LEVELS_LAST, WIDE),
            mask=(channel < CHANNELS)[:, None] & inside[None, :],
            other=0.0,
        )  # [C, S]
        total = tl.zeros((ROWS * COLUMNS,), number)
        for step in range(0, heads * blocks):
            head, block = step // blocks, step % blocks
            query = block * BLOCK_N + tl.arange(0, BLOCK_N)
            known = query < count
            row = (image * heads + head) * count + query
            q = tl.load(
                queries + row[:, None] * DEPTH + depth[None, :],
                mask=known[:, None] & (depth < DEPTH)[None, :],
                other=0.0,
            )
            logits = tl.zeros((BLOCK_N, ROWS * COLUMNS), number)
            if PROJECTED:
                weight = tl.load(
                    key_weight + (head * DEPTH + depth)[None, :] * CHANNELS + channel[:, None],
                    mask=(depth < DEPTH)[None, :] & (channel < CHANNELS)[:, None],
                    other=0.0,
                )  # [C, D]
                key = tl.zeros((ROWS * COLUMNS, BLOCK_D), number)
                key = product(tl.trans(x), weight, key, PRECISION).to(q.dtype)
                logits = product(q, tl.trans(key), logits, PRECISION)
            else:
                logits = product(q, x, logits, PRECISION)
            bias_row = bias_rows(row_bias, table, part, level, image, head, query, 0)
            bias_column = column_bias_of(
                bias_rows(column_bias, table, part, level, image, head, query, 1), known, x0, width, COLUMNS
            )
            logits += tile_bias(bias_row, known, bias_column, y, y1, ROWS, COLUMNS)
            base = tl.load(logsumexp + row, mask=known, other=0.0)
            counts = tl.load(chosen + image * count + query, mask=known, other=0) != 0
            power = tl.where(counts[:, None], tl.exp(logits * SCALE - base[:, None]), 0.0)
            total = tl.where(block == 0, 0.0, total) + tl.sum(power, axis=0)
            tl.store(mass_start + head * cells + cell, total, mask=inside & (block + 1 == blocks))


def plan_mass(
    queries: Tensor,
    levels: list[Tensor],
    key_weight: Tensor | None,
    row_bias: list[Tensor],
    column_bias: list[Tensor],
    chosen: Tensor,
    logsumexp: Tensor | None,
    temperature: float,
    card: Card | None = None,
) -> tuple[list[Launch], list[Tensor]]:
    """The launches of a call and their results."""
    problem = plan.Problem("attention_mass", queries, levels, key_weight, row_bias, column_bias, None, card)
    images, heads, count, _ = queries.shape
    plan.check_like("attention_mass", chosen, (images, count), chosen=chosen)
    launches: list[Launch] = []
    if logsumexp is None:
        arguments = (queries, levels, key_weight, row_bias, column_bias, None, 1 / temperature, card)
        launches, _, logsumexp, _ = plan_forward(*arguments)
    plan.check_like("attention_mass", queries, (images, heads, count), logsumexp=logsumexp)
    masses = [queries.new_empty(images, heads, *size) for size in problem.sizes]
    if not count:
        return [], [level.zero_() for level in masses]
    tile = configurations.mass(problem.shape, problem.card)
    parts = problem.cut(tile, images, problem.card.wanted_programs)
    mass = Launch(
        attention_mass_kernel,
        parts.count * images,
        dict(
            **problem.arguments(parts, tile),
            chosen=chosen.contiguous().view(torch.uint8),
            logsumexp=plan.dense_as(logsumexp, queries.dtype),
            mass=tuple(masses),
            SCALE=1 / temperature,
        ),
        tile.warps,
        tile.stages,
    )
    return [*launches, mass], masses


def attention_mass(*arguments) -> list[Tensor]:
    """fastkd::attention_mass on the GPU."""
    launches, masses = plan_mass(*arguments)
    plan.run(launches, arguments[0].device)
    return masses
