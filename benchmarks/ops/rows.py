"""The rows of `benchmarks.ops`: each op's arguments, our call, the plain forms, the work counted and the targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.ops import baselines
from benchmarks.ops.draws import Draw, Shape
from benchmarks.ops.limits import Pass
from fastkd import ops
from fastkd.distillers.decoder import DecoderLayer, Positions, position_embeddings


@dataclass(frozen=True)
class Targets:
    """What the row must reach, None where nothing is asked.

    Args:
        plain, compiled: times faster than those baselines.
        share: of the machine's limit.
        memory: extra memory in bytes handed to the caller ("returned": 1.0), or as a fraction of plain's scratch.
        of_plain: memory is such a fraction.
    """

    plain: float | None = None
    compiled: float | None = None
    share: float | None = None
    memory: float | None = None
    of_plain: bool = False


@dataclass
class Case:
    """One call, ready to run.

    Args:
        arguments: tensors and lists of them; gradients are taken for those that require one.
        ours: takes them.
        plain: name of a form -> function that takes them and gives the same.
        compiled: the form that torch.compile gets.
        passes: what must be read and written at least, for a row limited by memory.
        multiply_adds: for a row limited by arithmetic.
    """

    arguments: tuple
    ours: Callable
    plain: dict[str, Callable]
    compiled: str
    passes: tuple[Pass, ...] = ()
    multiply_adds: int = 0


def instance_norm_mse(draw: Draw) -> Case:
    arguments = (draw.pyramid(grad=True), draw.pyramid())
    plain = {"instance_norm + mse_loss": baselines.instance_norm_mse}
    both = (draw.shape.elements,) * 2
    passes = (Pass(both), Pass(both, draw.shape.elements))
    return Case(arguments, ops.instance_norm_mse, plain, *plain, passes=passes)


def box_pool(draw: Draw) -> Case:
    boxes, index = draw.boxes()
    size = draw.shape.image_size
    forms = {"masks": baselines.box_pool_masks, "slices": baselines.box_pool_slices}
    plain = {name: lambda levels, form=form: form(levels, boxes, size) for name, form in forms.items()}
    ours = lambda levels: ops.box_pool(levels, boxes, index, size)  # noqa: E731
    passes = (Pass((draw.in_boxes(boxes),)), Pass((), draw.shape.elements))
    return Case((draw.pyramid(grad=True),), ours, plain, "masks", passes)


def box_paint(draw: Draw) -> Case:
    boxes, index = draw.boxes()
    images, size, sizes = draw.shape.images, draw.shape.image_size, draw.shape.level_sizes
    forms = {"masks": baselines.box_paint_masks, "slices": baselines.box_paint_slices}
    plain = {name: lambda e, form=form: form(e, boxes, size, images, sizes) for name, form in forms.items()}

    def ours(embeddings):
        return ops.box_paint(embeddings, boxes, index, size, images, sizes)

    passes = (Pass((), draw.shape.elements), Pass((draw.in_boxes(boxes),)))
    return Case((draw.embeddings(),), ours, plain, "masks", passes)


def box_paint_conv3x3(draw: Draw) -> Case:
    boxes, index = draw.boxes()
    images, size, sizes = draw.shape.images, draw.shape.image_size, draw.shape.level_sizes
    channels = draw.shape.channels
    weight = draw.tensor(channels, channels, 3, 3, grad=True, scale=(9 * channels) ** -0.5)
    arguments = (draw.embeddings(), weight, draw.tensor(channels, grad=True))

    def ours(embeddings, weight, bias):
        return ops.box_paint_conv3x3(embeddings, weight, bias, boxes, index, size, images, sizes)

    def plain(embeddings, weight, bias):
        return baselines.box_paint_conv3x3(embeddings, weight, bias, boxes, size, images, sizes)

    passes = (Pass((), draw.shape.elements), Pass((draw.shape.elements,)))
    return Case(arguments, ours, {"masks + conv2d": plain}, "masks + conv2d", passes)


def norm_relu_box_pool(draw: Draw) -> Case:
    boxes, index = draw.boxes()
    size = draw.shape.image_size
    plain = {"group_norm + relu + masks": lambda levels: baselines.norm_relu_box_pool(levels, boxes, size)}
    ours = lambda levels: ops.norm_relu_box_pool(levels, boxes, index, size)  # noqa: E731
    elements = draw.shape.elements
    passes = (Pass((elements,)), Pass((draw.in_boxes(boxes),)), Pass((elements,), elements))
    return Case((draw.pyramid(grad=True),), ours, plain, *plain, passes=passes)


def mask_pool(draw: Draw) -> Case:
    masks, index = draw.masks()
    plain = {"masks": lambda levels: baselines.mask_pool(levels, masks)}
    ours = lambda levels: ops.mask_pool(levels, masks, index)  # noqa: E731
    passes = (Pass((draw.in_masks(masks),)), Pass((), draw.shape.elements))
    return Case((draw.pyramid(grad=True),), ours, plain, "masks", passes)


def mask_paint(draw: Draw) -> Case:
    masks, index = draw.masks()
    images, sizes = draw.shape.images, draw.shape.level_sizes
    plain = {"masks": lambda embeddings: baselines.mask_paint(embeddings, masks, images, sizes)}
    ours = lambda embeddings: ops.mask_paint(embeddings, masks, index, images, sizes)  # noqa: E731
    passes = (Pass((), draw.shape.elements), Pass((draw.in_masks(masks),)))
    return Case((draw.embeddings(),), ours, plain, "masks", passes)


def _tables(queries, key_weight, rows, columns):
    """What `instance_attention` takes in the place of a position embedding: row and column biases of the queries."""
    absorbed = torch.einsum("bgnd,gdc->bgnc", queries, key_weight.unflatten(0, (queries.shape[1], -1)))
    absorbed = absorbed.contiguous()  # else each product below copies it and keeps the copy for its backward pass
    return [absorbed @ row.t() for row in rows], [absorbed @ column.t() for column in columns]


def _attention_arguments(draw: Draw, count: int, grad: bool) -> tuple:
    """Queries, frozen levels, key projection, position embeddings of rows and columns."""
    shape = draw.shape
    depth = shape.channels // shape.heads
    queries = draw.tensor(shape.images, shape.heads, count, depth, grad=grad, scale=depth**-0.5)
    weight = draw.tensor(shape.channels, shape.channels, grad=grad, scale=shape.channels**-0.5)
    sides = zip(*shape.level_sizes)
    rows, columns = ([draw.tensor(side, shape.channels, grad=grad, scale=0.3) for side in axis] for axis in sides)
    return queries, draw.pyramid(), weight, rows, columns


def instance_attention(draw: Draw) -> Case:
    """Counted: logits and output forward; the gradients of probabilities, values and logits backward."""
    shape = draw.shape
    arguments = (*_attention_arguments(draw, shape.queries, True), draw.pyramid(grad=True))

    def ours(queries, levels, key_weight, rows, columns, values):
        tables = _tables(queries, key_weight, rows, columns)
        return ops.instance_attention(queries, levels, key_weight, *tables, values)[0]

    channels, count = shape.channels, shape.queries
    logits = min(shape.heads * count * channels, channels * (channels + count))
    to_queries = min(shape.heads * count * channels, channels * (channels + 2 * count))
    work = shape.images * shape.cells * (logits + 3 * count * channels + to_queries)
    plain = {"matmul + softmax": baselines.attention_matmul, "fused attention": baselines.attention_fused}
    return Case(arguments, ours, plain, "matmul + softmax", multiply_adds=work)


def _position_embedding(positions: Positions) -> Tensor:
    """[B, S, 256]: of every cell [row part | column part]."""
    heights, widths = zip(*positions.level_sizes)
    parts = zip(positions.rows.split(heights, 1), positions.columns.split(widths, 1))
    cells = []
    for (row, column), (height, width) in zip(parts, positions.level_sizes):
        sides = [row[:, :, None].expand(-1, -1, width, -1), column[:, None].expand(-1, height, -1, -1)]
        cells.append(torch.cat(sides, dim=3).flatten(1, 2))
    return torch.cat(cells, dim=1)


class Attend(nn.Module):
    """A decoder layer's attention as a module of its own, for functional_call."""

    def __init__(self, layer: DecoderLayer):
        super().__init__()
        self.layer = layer

    def forward(self, queries, levels, positions):
        return self.layer.attend(queries, levels, positions)[0]


def decoder_attention(draw: Draw) -> Case:
    shape, device = draw.shape, draw.device
    torch.manual_seed(0)
    layer = Attend(DecoderLayer(shape.channels, shape.channels, shape.heads)).to(device, draw.dtype)
    names = [f"layer.{part}.{kind}" for part in ("query", "key", "value", "position") for kind in ("weight", "bias")]
    # the biases of keys and positions move all logits of a query alike: their gradient is rounding, nothing to compare
    frozen = ("layer.key.bias", "layer.position.bias")
    weights = [layer.get_parameter(name).detach().requires_grad_(name not in frozen) for name in names]
    sizes = torch.tensor([shape.image_size] * shape.images, device=device)
    positions = position_embeddings(sizes, shape.image_size, shape.level_sizes)
    embedding = _position_embedding(positions)

    def ours(queries, levels, weights):
        return torch.func.functional_call(layer, dict(zip(names, weights)), (queries, levels, positions))

    def form(fused):
        return lambda queries, levels, weights: baselines.decoder_attention(
            queries, levels, weights, embedding.to(queries.dtype), shape.heads, fused
        )

    queries = draw.tensor(shape.images, shape.queries, shape.channels, grad=True)
    plain = {"matmul + softmax": form(False), "fused attention": form(True)}
    return Case((queries, draw.pyramid(), weights), ours, plain, "matmul + softmax")


def mass_and_mimic(draw: Draw) -> Case:
    shape = draw.shape
    queries, levels, weight, rows, columns = _attention_arguments(draw, shape.real, False)
    chosen = torch.ones(shape.images, shape.real, dtype=torch.bool, device=draw.device)
    _, logsumexp = ops.instance_attention(queries, levels, weight, *_tables(queries, weight, rows, columns), levels)

    def ours(queries, levels, weight, rows, columns, student, teacher):
        with torch.no_grad():
            tables = _tables(queries, weight, rows, columns)
        mass = ops.attention_mass(queries, levels, weight, *tables, chosen, logsumexp)
        return ops.value_mimic(student, teacher, mass)

    arguments = (queries, levels, weight, rows, columns, draw.pyramid(grad=True), draw.pyramid())
    name = "matmul + softmax + layer_norm"
    return Case(arguments, ours, {name: baselines.mass_and_mimic}, name)


def value_mimic(draw: Draw) -> Case:
    shape = draw.shape
    mass = [level.float().square() for level in draw.pyramid(shape.heads)]
    arguments = (draw.pyramid(grad=True), draw.pyramid(), mass)

    def plain(student, teacher, mass):
        return baselines.value_mimic(student, teacher, torch.cat([level.flatten(2) for level in mass], dim=2))

    reads = (shape.elements, shape.elements, shape.images * shape.heads * shape.cells)
    passes = (Pass(reads), Pass(reads, shape.elements))
    return Case(arguments, ops.value_mimic, {"layer_norm": plain}, "layer_norm", passes)


def imitation_mask(draw: Draw) -> Case:
    shape = draw.shape
    boxes, index = draw.boxes()
    ratio = torch.tensor([0.5, 1.0, 2.0]).repeat(-(-shape.anchors // 3))[: shape.anchors]
    size = 4 * torch.tensor([2 ** (place // 3 / 3) for place in range(shape.anchors)])
    base = torch.stack([-size * ratio**-0.5, -size * ratio**0.5, size * ratio**-0.5, size * ratio**0.5], dim=1) / 2
    anchors = [(base * stride).to(draw.device) for stride in shape.strides]
    strides, sizes = [(stride, stride) for stride in shape.strides], shape.level_sizes
    plain = {"IoU matrix": lambda boxes: baselines.imitation_mask(boxes, anchors, strides, shape.images, sizes)}
    ours = lambda boxes: ops.imitation_mask(boxes, index, anchors, strides, shape.images, sizes)  # noqa: E731
    return Case((boxes,), ours, plain, "IoU matrix")


def masked_mse(draw: Draw) -> Case:
    shape = draw.shape
    masks = [level[:, 0] > 1.5 for level in draw.pyramid(1)]  # one cell in six
    arguments = (draw.pyramid(grad=True), draw.pyramid(), masks)
    plain = {"product": baselines.masked_mse_product, "selection": baselines.masked_mse_selected}
    reads = (draw.in_lines(masks),) * 2
    return Case(arguments, ops.masked_mse, plain, "product", (Pass(reads), Pass(reads, shape.elements)))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    build: Callable[[Draw], Case]
    targets: Targets = Targets()
    changes: dict = field(default_factory=dict)
    growth: tuple[str, ...] = ("images", "cells")

    def shape(self, base: Shape) -> Shape:
        return dataclasses.replace(base, **self.changes)


BOXES, QUERIES = ("images", "cells", "boxes"), ("images", "cells", "queries")
ROWS = (
    Row("instance_norm_mse", instance_norm_mse, Targets(10, 5, 0.7, 1)),
    Row("box_pool, 7 boxes", box_pool, Targets(15, 10, None, 1), {"boxes": 7}, BOXES),
    Row("box_pool, 30 boxes", box_pool, Targets(15, 10, None, 1), {"boxes": 30}, ()),
    Row("box_pool, 100 boxes", box_pool, Targets(15, 10, None, 1), {"boxes": 100}, ()),
    Row("box_paint", box_paint, Targets(8, 5, 0.7, 1), growth=BOXES),
    Row("box_paint_conv3x3", box_paint_conv3x3, Targets(30, 25, 0.6, 1), growth=BOXES),
    Row("norm_relu_box_pool", norm_relu_box_pool, Targets(8, 4, None, 1), growth=BOXES),
    Row("instance_attention, N = 42", instance_attention, Targets(4, 4, 0.6, 1 / 20, True), {"queries": 42}, QUERIES),
    Row("instance_attention, N = 300", instance_attention, Targets(3, 3, 0.6, 1 / 20, True), {"queries": 300}, ()),
    Row("attention_mass + value_mimic", mass_and_mimic, Targets(8, 4, None, 1 / 10, True)),
    Row("imitation_mask, 9 anchors", imitation_mask, Targets(50, 20, None, 1 / 100, True), growth=BOXES),
    Row("decoder attention with projections, N = 42", decoder_attention, Targets(), {"queries": 42}, ()),
    Row("value_mimic", value_mimic),
    Row("mask_pool", mask_pool, growth=BOXES),
    Row("mask_paint", mask_paint, growth=BOXES),
    Row("masked_mse", masked_mse),
)
BY_NAME = {row.name: row for row in ROWS}
