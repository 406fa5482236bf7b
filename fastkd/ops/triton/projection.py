"""A linear of all cells of a pyramid on the GPU (fastkd/ops/project_levels.py), half types: one launch for all levels.

Forward a program takes a tile of cells of one level for a block of outputs: all of them at 256, so that levels cross
memory once. The gradient of the levels is the same kernel with the weight turned. For those of weight and bias a
program goes through its share of all levels' tiles for a block of the weight, in registers, in float32; a second kernel
adds up what the programs found in a fixed order: no atomics, the same bits always.
  traffic   levels read once, results written once; the gradient of the weight reads levels and gradients once from
            memory (blocks of the weight side by side, so that the L2 cache has the second read)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.ops.project_levels import empty_pyramid
from fastkd.ops.triton import configurations, plan
from fastkd.ops.triton.attention_backward import merge_of
from fastkd.ops.triton.configurations import Card, Tiles
from fastkd.ops.triton.plan import Launch
from fastkd.ops.triton.tiles import map_offsets, pick


@triton.jit
def _find_tile(tile, images, cells, LEVELS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Level, image, first cell and cells of the level of a tile; tiles are in the order of levels and images."""
    level, image, start, plane = 0, tile * 0, tile * 0, tile * 0
    for index in tl.static_range(LEVELS):
        here_cells = tl.load(cells + index).to(tl.int32)
        each = tl.cdiv(here_cells, BLOCK_S)
        here = (tile >= 0) & (tile < each * images)
        level = tl.where(here, index, level)
        image = tl.where(here, tile // tl.maximum(each, 1), image)
        start = tl.where(here, tile % tl.maximum(each, 1) * BLOCK_S, start)
        plane = tl.where(here, here_cells, plane)
        tile -= each * images
    return level, image.to(tl.int64), start, plane


@triton.jit(do_not_specialize=["images"])
def project_levels_kernel(
    levels,  # L pointers to [B, INPUTS, H, W]
    weight,  # [OUTPUTS, INPUTS], or [INPUTS, OUTPUTS] where TURNED
    bias,  # [OUTPUTS], where WITH_BIAS
    results,  # L pointers to [B, OUTPUTS, H, W]
    images,
    cells,  # [L, 1]: H * W of each level
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TURNED: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    LAST: tl.constexpr,  # channels-last
    WIDE: tl.constexpr,  # offsets in an image need 64 bits
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks: tl.constexpr = (OUTPUTS + BLOCK_O - 1) // BLOCK_O
    level, image, start, plane = _find_tile(tl.program_id(0) // blocks, images, cells, len(levels), BLOCK_S)
    output = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    cell = start + tl.arange(0, BLOCK_S)
    inside, known = cell < plane, output < OUTPUTS
    level_start = pick(levels, level) + image * INPUTS * plane
    total = tl.zeros((BLOCK_S, BLOCK_O), tl.float32)
    for first in range(0, INPUTS, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        given = channel < INPUTS
        x = tl.load(
            level_start + tl.trans(map_offsets(channel, cell, plane, INPUTS, LAST, WIDE)),
            mask=inside[:, None] & given[None, :],
            other=0.0,
        )  # [S, C]
        place = channel[:, None] * OUTPUTS + output[None, :] if TURNED else output[None, :] * INPUTS + channel[:, None]
        w = tl.load(weight + place, mask=given[:, None] & known[None, :], other=0.0)  # [C, O]
        total = tl.dot(x, w, total)
    if WITH_BIAS:
        total += tl.load(bias + output, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(
        pick(results, level)
        + image * OUTPUTS * plane
        + tl.trans(map_offsets(output, cell, plane, OUTPUTS, LAST, WIDE)),
        total.to(results[0].dtype.element_ty),
        mask=inside[:, None] & known[None, :],
    )


@triton.jit(do_not_specialize=["images", "tiles", "shares"])
def project_levels_weight_kernel(
    grads,  # L pointers to [B, OUTPUTS, H, W]
    levels,  # L pointers to [B, INPUTS, H, W]
    part_weight,  # [shares, OUTPUTS, INPUTS] float32, where FOR_WEIGHT
    part_bias,  # [shares, OUTPUTS] float32, where FOR_BIAS
    images,
    cells,  # [L, 1]: H * W of each level
    tiles,  # of all levels and images
    shares,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
    FOR_BIAS: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    across: tl.constexpr = (INPUTS + BLOCK_C - 1) // BLOCK_C if FOR_WEIGHT else 1
    blocks: tl.constexpr = (OUTPUTS + BLOCK_O - 1) // BLOCK_O * across
    share, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    output = block // across * BLOCK_O + tl.arange(0, BLOCK_O)
    channel = block % across * BLOCK_C + tl.arange(0, BLOCK_C)
    known, given = output < OUTPUTS, channel < INPUTS
    sums = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    bias = tl.zeros((BLOCK_O,), tl.float32)
    each = tl.cdiv(tiles, shares)
    for tile in range(share * each, tl.minimum(share * each + each, tiles)):
        level, image, start, plane = _find_tile(tile, images, cells, len(levels), BLOCK_S)
        cell = start + tl.arange(0, BLOCK_S)
        inside = cell < plane
        g = tl.load(
            pick(grads, level) + image * OUTPUTS * plane + map_offsets(output, cell, plane, OUTPUTS, LAST, WIDE),
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )  # [O, S]
        if FOR_WEIGHT:
            x = tl.load(
                pick(levels, level)
                + image * INPUTS * plane
                + tl.trans(map_offsets(channel, cell, plane, INPUTS, LAST, WIDE)),
                mask=inside[:, None] & given[None, :],
                other=0.0,
            )  # [S, C]
            sums = tl.dot(g, x, sums)
        if FOR_BIAS:
            bias += tl.sum(g.to(tl.float32), axis=1)
    if FOR_WEIGHT:
        place = (share.to(tl.int64) * OUTPUTS + output[:, None]) * INPUTS + channel[None, :]
        tl.store(part_weight + place, sums, mask=known[:, None] & given[None, :])
    if FOR_BIAS:
        tl.store(part_bias + share * OUTPUTS + output, bias, mask=known & (block % across == 0))


class _Problem:
    """Pyramids of one memory order and what kernels are given of them."""

    def __init__(self, op: str, levels: list[Tensor], weight: Tensor, grads: list[Tensor] | None, card: Card | None):
        self.images, self.inputs = levels[0].shape[:2]
        self.outputs = weight.shape[0]
        self.cells = tuple(level.shape[2] * level.shape[3] for level in levels)
        self._check(op, levels, weight, grads)
        self.levels, self.last = plan.in_one_order(levels)
        order = torch.channels_last if self.last else torch.contiguous_format
        self.grads = None
        if grads is not None:
            self.grads = [plan.aligned(grad.contiguous(memory_format=order)) for grad in grads]
        self.weight = plan.aligned(weight.contiguous())
        self.card = card or Card.of(levels[0].device)
        self.wide = max(self.cells) * max(self.inputs, self.outputs) >= plan.NARROW_LIMIT

    def _check(self, op, levels, weight, grads) -> None:
        """What could read or write memory that is not the tensors'."""
        dtype, device = levels[0].dtype, levels[0].device
        fits = dtype in (torch.bfloat16, torch.float16) and tuple(weight.shape) == (self.outputs, self.inputs)
        fits = fits and self.inputs > 0 and self.outputs > 0
        fits = fits and (grads is None or len(grads) == len(levels))
        for index, level in enumerate(levels):
            fits = fits and tuple(level.shape) == (self.images, self.inputs, *level.shape[2:])
            if grads is not None and fits:
                fits = tuple(grads[index].shape) == (self.images, self.outputs, *level.shape[2:])
        everything = [*levels, weight, *(grads or [])]
        if not fits or any(one.dtype != dtype or one.device != device for one in everything):
            raise ValueError(
                f"{op}: arguments must fit each other in shape, half dtype and device; call it through the distillers"
            )

    def tiles(self, block: int) -> int:
        return self.images * sum(-(-cells // block) for cells in self.cells)

    def arguments(self, tiles: Tiles) -> dict:
        return dict(
            images=self.images,
            cells=plan.table_of([(cells,) for cells in self.cells], self.weight.device),
            LAST=self.last,
            WIDE=self.wide,
            BLOCK_S=tiles.cells,
            BLOCK_O=tiles.outputs,
            BLOCK_C=tiles.inputs,
        )

    def projection(self, levels: list[Tensor], results: list[Tensor], bias: Tensor | None, turned: bool) -> Launch:
        """Levels times the weight, or times the weight turned."""
        inputs, outputs = (self.outputs, self.inputs) if turned else (self.inputs, self.outputs)
        tiles = configurations.projection(outputs, self.last, self.card)
        return Launch(
            project_levels_kernel,
            self.tiles(tiles.cells) * -(-outputs // tiles.outputs),
            dict(
                **self.arguments(tiles),
                levels=tuple(levels),
                weight=self.weight,
                bias=bias,
                results=tuple(results),
                INPUTS=inputs,
                OUTPUTS=outputs,
                TURNED=turned,
                WITH_BIAS=bias is not None,
            ),
            tiles.warps,
            tiles.stages,
        )

    def sums(self, for_weight: bool, for_bias: bool) -> tuple[list[Launch], list[Tensor]]:
        """Gradients of weight and bias, those wanted."""
        tiles = configurations.projection_weight(self.outputs, self.inputs, self.last, self.card)
        blocks = -(-self.outputs // tiles.outputs) * (-(-self.inputs // tiles.inputs) if for_weight else 1)
        count = self.tiles(tiles.cells)
        shares = min(max(self.card.processors // blocks, 1), max(count, 1))
        wanted = (((self.outputs, self.inputs), for_weight), ((self.outputs,), for_bias))
        part_weight, part_bias = (
            self.weight.new_empty(shares, *side, dtype=torch.float32) if want else None for side, want in wanted
        )
        launch = Launch(
            project_levels_weight_kernel,
            shares * blocks,
            dict(
                **self.arguments(tiles),
                grads=tuple(self.grads),
                levels=tuple(self.levels),
                part_weight=part_weight,
                part_bias=part_bias,
                tiles=count,
                shares=shares,
                INPUTS=self.inputs,
                OUTPUTS=self.outputs,
                FOR_WEIGHT=for_weight,
                FOR_BIAS=for_bias,
            ),
            tiles.warps,
            tiles.stages,
        )
        parts = [part for part in (part_weight, part_bias) if part is not None]
        sums = [self.weight.new_empty(part.shape[1:]) for part in parts]
        return [launch, *merge_of(parts, sums, [one.numel() for one in sums])], sums


def plan_projection(
    levels: list[Tensor], weight: Tensor, bias: Tensor, card: Card | None = None
) -> tuple[list[Launch], list[Tensor]]:
    """The launch of a projection and what it writes."""
    problem = _Problem("project_levels", levels, weight, None, card)
    plan.check_like("project_levels", weight, (problem.outputs,), bias=bias)
    results = empty_pyramid(problem.levels, problem.outputs)
    return [problem.projection(problem.levels, results, plan.aligned(bias.contiguous()), False)], results


def plan_backward(
    grads: list[Tensor],
    levels: list[Tensor],
    weight: Tensor,
    for_levels: bool,
    for_weight: bool,
    for_bias: bool,
    card: Card | None = None,
) -> tuple[list[Launch], list[Tensor]]:
    """The launches of a backward pass and the gradients they write: of levels, weight and bias, those wanted."""
    problem = _Problem("project_levels_backward", levels, weight, grads, card)
    launches, results = [], []
    if for_levels:
        results = empty_pyramid(problem.levels, problem.inputs)
        launches = [problem.projection(problem.grads, results, None, True)]
    if for_weight or for_bias:
        more, sums = problem.sums(for_weight, for_bias)
        launches, results = launches + more, results + sums
    return launches, results


def project_levels(levels: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    """fastkd::project_levels on the GPU."""
    launches, results = plan_projection(levels, weight, bias)
    plan.run(launches, weight.device)
    return results


def project_levels_backward(*arguments) -> list[Tensor]:
    """fastkd::project_levels_backward on the GPU."""
    launches, results = plan_backward(*arguments)
    plan.run(launches, arguments[2].device)
    return results
