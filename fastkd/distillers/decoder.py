"""ICD's decoder: queries attend to the teacher's pyramid (methods 1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastkd.distillers.constants import constant
from fastkd.distillers.linears import Biases
from fastkd.distillers.queries import AXIS_FEATURES, mlp, waves
from fastkd.ops import attention_mass, instance_attention
from fastkd.ops._support.coverage import full_precision
from fastkd.ops._support.layout import is_channels_last
from fastkd.ops.instance_attention import absorbing_is_cheaper
from fastkd.ops.project_levels import kernel_takes
from fastkd.ops.project_levels import project_levels as project_by_kernel

Axes = tuple[Tensor, Tensor, Tensor, Tensor]


def valid_sizes(
    image_sizes: Tensor,
    padded_size: tuple[int, int],
    level_sizes: Sequence[tuple[int, int]],
    axes: Axes | None = None,
) -> list[Tensor]:
    """Rows and columns of each level that lie in the image: L tensors [B, 2] int64.

    ceil(image size / stride), at most the level's; stride = mean of (padded height / H_l, padded width / W_l).
    """
    axes = axes or level_axes(tuple(level_sizes), padded_size, image_sizes.device)
    return list(_valid_sizes(image_sizes, axes).long().unbind(1))


def _valid_sizes(image_sizes: Tensor, axes: Axes) -> Tensor:
    """`valid_sizes` [B, L, 2] as float64."""
    strides, limits, _, _ = axes
    return torch.minimum((image_sizes[:, None] / strides).ceil(), limits)


@constant
def level_axes(level_sizes: tuple[tuple[int, int], ...], padded_size: tuple[int, int], device: torch.device) -> Axes:
    """What does not change with the batch: strides [L, 1] and limits [L, 2] of the levels, float64; place from 1 [P]

    float32 and axis [P] int64 (2 * level, plus 1 for columns) of the rows of all levels, then of their columns.
    """
    strides = [(padded_size[0] / rows + padded_size[1] / columns) / 2 for rows, columns in level_sizes]
    sides = [(2 * level + axis, size[axis]) for axis in (0, 1) for level, size in enumerate(level_sizes)]
    tables = (
        torch.tensor(strides, dtype=torch.float64)[:, None],
        torch.tensor(level_sizes, dtype=torch.float64),
        torch.cat([torch.arange(1, side + 1, dtype=torch.float32) for _, side in sides]),
        torch.tensor([axis for axis, side in sides for _ in range(side)]),
    )
    return tuple(table.to(device, non_blocking=True) for table in tables)


@dataclass
class Positions:
    """Position embeddings of a pyramid, rows and columns apart, all levels in a row.

    Args:
        rows: [B, sum H_l, 128] and columns: [B, sum W_l, 128].
        row_inside: [B, sum H_l] bool and column_inside: [B, sum W_l] bool: False in the padding.
        heights, widths: H_l and W_l of the levels.
    """

    rows: Tensor
    columns: Tensor
    row_inside: Tensor
    column_inside: Tensor
    heights: list[int]
    widths: list[int]

    @classmethod
    def of(
        cls,
        image_sizes: Tensor,
        padded_size: tuple[int, int],
        level_sizes: Sequence[tuple[int, int]],
        axes: Axes | None = None,
    ) -> Positions:
        """The embeddings of these images (image_sizes [B, 2]) on levels of these sizes; axes: `level_axes` of them."""
        axes = axes or level_axes(tuple(level_sizes), padded_size, image_sizes.device)
        _, _, place, axis = axes
        valid = _valid_sizes(image_sizes, axes).flatten(1).index_select(1, axis).float()  # [B, P]
        frequencies, phases = waves(True, valid.device)
        table, inside = torch.addcmul(phases, (place / valid)[..., None], frequencies).sin(), place <= valid
        heights, widths = (list(sides) for sides in zip(*level_sizes, strict=True))
        parts = [sum(heights), sum(widths)]
        return cls(*table.split(parts, dim=1), *inside.split(parts, dim=1), heights, widths)

    def bias(self, queries: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Row biases [B, G, N, H_l] and column biases [B, G, N, W_l] of every level.

        queries [B, G, N, 256] = what multiplies [row part | column part]; -inf outside the image.
        """
        row, column = queries.flatten(1, 2).split(AXIS_FEATURES, dim=2)  # [B, G * N, 128]
        sides = ((row, self.rows, self.row_inside), (column, self.columns, self.column_inside))
        biases = []
        for part, table, inside in sides:
            outside = inside.log().to(part.dtype)[:, None]  # 0 inside, -inf outside
            biases.append(torch.baddbmm(outside, part, table.to(part).transpose(1, 2)).unflatten(1, queries.shape[1:3]))
        return list(biases[0].split(self.heights, dim=3)), list(biases[1].split(self.widths, dim=3))


@dataclass
class Attention:
    """What a layer's attention was computed from, for the mass.

    Args:
        queries: [B, G, N, d], scaled by 1 / sqrt(d).
        levels: the teacher's pyramid.
        key_weight: [C, C_teacher].
        row_bias, column_bias: L tensors [B, G, N, H_l] and [B, G, N, W_l].
        values: L tensors [B, C, H_l, W_l], W_v x + b_v.
        logsumexp: [B, G, N].
        absorbed: [B, G, N, C_teacher], queries times key_weight.
    """

    queries: Tensor
    levels: Sequence[Tensor]
    key_weight: Tensor
    row_bias: list[Tensor]
    column_bias: list[Tensor]
    values: list[Tensor]
    logsumexp: Tensor
    absorbed: Tensor

    def mass(self, chosen: Tensor, temperature: float = 1.0) -> list[Tensor]:
        """Attention mass [B, G, H_l, W_l] of the chosen [B, n] among the first n queries; detached."""
        count = chosen.shape[1]
        queries = self.queries[:, :, :count]
        absorb = absorbing_is_cheaper(queries, self.levels[0].shape[1])
        return attention_mass(
            queries,
            self.levels,
            self.key_weight,
            [table[:, :, :count] for table in self.row_bias],
            [table[:, :, :count] for table in self.column_bias],
            chosen,
            self.logsumexp[:, :, :count] if temperature == 1 else None,
            temperature,
            absorbed=self.absorbed[:, :, :count] if absorb else None,
        )

    def maps(self, image: Tensor, place: Tensor) -> list[Tensor]:
        """Attention maps [K, G, H_l, W_l] of the queries at (image [K], place [K]); detached."""
        return attention_mass(
            self.queries[image, :, place][:, :, None],
            [level[image] for level in self.levels],
            self.key_weight,
            [table[image, :, place][:, :, None] for table in self.row_bias],
            [table[image, :, place][:, :, None] for table in self.column_bias],
            torch.ones(image.shape[0], 1, dtype=torch.bool, device=image.device),
        )


def xavier_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear with Xavier-uniform weight and zero bias, as attention projections start."""
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def project_levels(linear: nn.Linear, levels: Sequence[Tensor], *, train_bias: bool = True) -> list[Tensor]:
    """The linear applied to every cell: L tensors [B, C, H_l, W_l] -> [B, outputs, H_l, W_l], in the levels' order.

    Without train_bias the bias gets no gradient from here.
    """
    weight, kind = linear.weight, levels[0].device.type
    bias = linear.bias if train_bias else linear.bias.detach()
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:  # one cast for all levels
        dtype = torch.get_autocast_dtype(kind)
        weight, bias, levels = weight.to(dtype), bias.to(dtype), [level.to(dtype) for level in levels]
    if kernel_takes(levels) and weight.dtype == levels[0].dtype:
        return project_by_kernel(levels, weight, bias)
    return list(_Project.apply(weight, bias, *levels))


def _rows(level: Tensor) -> Tensor:
    """[B, C, H, W], channels-last -> its cells [B * H * W, C], a view."""
    return level.permute(0, 2, 3, 1).flatten(0, 2)


class _Project(torch.autograd.Function):
    """The same weight and bias for all cells, as plain matrix products in the memory order of each level.

    Half types on a GPU have a kernel for all levels instead.

    On a CPU they take less than half the time of 1x1 convolutions of contiguous maps, and the gradient of the weight
    grows from level to level in the products, without additions of its own.
    """

    @staticmethod
    def forward(weight: Tensor, bias: Tensor, *levels: Tensor) -> tuple[Tensor, ...]:
        projected = []
        for level in levels:
            images, _, rows, columns = level.shape
            if is_channels_last(level):
                cells = torch.addmm(bias, _rows(level), weight.t())
                projected.append(cells.unflatten(0, (images, rows, columns)).permute(0, 3, 1, 2))
            else:
                cells = torch.baddbmm(bias[:, None], weight.expand(images, -1, -1), level.flatten(2))
                projected.append(cells.unflatten(2, (rows, columns)))
        return tuple(projected)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        weight, _, *levels = inputs
        ctx.save_for_backward(weight, *levels)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        weight, *levels = ctx.saved_tensors
        needs_weight, needs_bias, *needs_level = ctx.needs_input_grad
        for_weight, more = weight, 0.0  # with a factor of 0 the weight is not read
        for_bias, for_levels = [], [None] * len(levels)
        for index in reversed(range(len(levels))):  # small levels first: half types round the sum after each
            level, grad = levels[index], grads[index]
            if grad is None:
                continue
            channels_last = is_channels_last(level)
            flat = _rows(grad) if channels_last else grad.flatten(2)
            if needs_weight and channels_last:
                for_weight = torch.addmm(for_weight, flat.t(), _rows(level), beta=more)
            elif needs_weight:
                for_weight = torch.addbmm(for_weight, flat, level.flatten(2).transpose(1, 2), beta=more)
            more = 1.0
            if needs_bias:
                for_bias.append(flat.sum(0 if channels_last else (0, 2)))
            if needs_level[index] and channels_last:
                for_levels[index] = (flat @ weight).view(level.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
            elif needs_level[index]:
                for_levels[index] = (weight.t().expand(len(level), -1, -1) @ flat).view(level.shape)
        for_weight = for_weight if needs_weight and more > 0 else None
        return for_weight, torch.stack(for_bias).sum(0) if for_bias else None, *for_levels


class DecoderLayer(nn.Module):
    """Attention of the queries over the teacher's pyramid and a feed-forward, each with residual and LayerNorm.

    key_s = W_k (x_s + W_p pos_s + b_p) + b_k, value_s = W_v x_s + b_v; b_k and b_p move all logits of a query alike, so
    they are left out and their gradient is zero. Under autocast only what touches cells is in its dtype: casting the
    weights would cost more operators than the few queries' products save.

    Args:
        channels: C, of queries and values, divisible by heads.
        teacher_channels: of the pyramid.
        heads: G.
    """

    def __init__(self, channels: int, teacher_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = xavier_linear(channels, channels)
        self.key = xavier_linear(teacher_channels, channels)
        self.value = xavier_linear(teacher_channels, channels)
        self.position = xavier_linear(2 * AXIS_FEATURES, teacher_channels)
        self.output = xavier_linear(channels, channels)
        self.norm_attention = nn.LayerNorm(channels)
        self.feed_forward = mlp(channels, 4 * channels, channels)
        self.norm_feed_forward = nn.LayerNorm(channels)

    def query_linears(self) -> list[nn.Linear]:
        """Those whose biases reach every query: the values' too, as the attention's weights of a query sum to 1."""
        return [
            self.query,
            self.value,
            self.output,
            *(part for part in self.feed_forward if isinstance(part, nn.Linear)),
        ]

    def _biases(self, queries: Tensor) -> Biases:
        return Biases(self.query_linears(), len(queries) * queries.shape[1])

    def forward(
        self, queries: Tensor, levels: Sequence[Tensor], positions: Positions, biases: Biases | None = None
    ) -> tuple[Tensor, Attention]:
        """Queries [B, N, C] -> decoded queries [B, N, C] and their attention.

        biases: of `query_linears`, perhaps among others; made where they are not given.
        """
        biases = self._biases(queries) if biases is None else biases
        attention_output, attention = self.attend(queries, levels, positions, biases)
        with full_precision(queries):
            decoded = self.norm_attention(queries + biases.apply(self.output, attention_output))
            return self.norm_feed_forward(decoded + biases.apply_all(self.feed_forward, decoded)), attention

    def attend(
        self, queries: Tensor, levels: Sequence[Tensor], positions: Positions, biases: Biases | None = None
    ) -> tuple[Tensor, Attention]:
        """Queries [B, N, C] -> concatenated heads [B, N, C] and the attention."""
        with full_precision(queries):
            biases = self._biases(queries) if biases is None else biases
            projected = biases.apply(self.query, queries).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, G, N, d]
        projected = projected * projected.shape[3] ** -0.5
        absorbed, row_bias, column_bias = self._tables(projected, positions)
        values = project_levels(self.value, levels, train_bias=False)
        output, logsumexp = instance_attention(projected, levels, self.key.weight, row_bias, column_bias, values)
        attention = Attention(projected, levels, self.key.weight, row_bias, column_bias, values, logsumexp, absorbed)
        # The values' bias moves the output of every query by itself, so that its gradient needs no pass over all cells.
        output = output.transpose(1, 2).flatten(2)
        return _Moved.apply(output, biases.of(self.value)), attention

    def _tables(self, projected: Tensor, positions: Positions) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Queries times key_weight, row and column biases."""
        with full_precision(projected):
            projected = projected.to(self.key.weight.dtype)
            projected = _Unmoved.apply(projected, self.key.bias, self.position.bias)
            weight = self.key.weight.unflatten(0, (self.heads, -1))  # [G, d, C_teacher]
            absorbed = torch.einsum("bgnd,gdc->bgnc", projected, weight)
            return absorbed, *positions.bias(absorbed @ self.position.weight)


class _Unmoved(torch.autograd.Function):
    """Gives its first argument; the gradient of the others, which the loss does not depend on, is zero.

    They would move all logits of a query alike, which no softmax notices. As parameters of published checkpoints, of
    the optimiser and of DDP they still take part.
    """

    @staticmethod
    def forward(ctx, value: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        others = ctx.saved_tensors
        zeros = others[0].new_zeros(sum(other.numel() for other in others)).split([other.numel() for other in others])
        return grad, *(zero.view(other.shape) for zero, other in zip(zeros, others))


class _Moved(torch.autograd.Function):
    """Gives its first argument [B, N, C], to which the second [B * N, C] was added already, without its gradient."""

    @staticmethod
    def forward(ctx, value: Tensor, added: Tensor) -> Tensor:
        ctx.dtype = added.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, grad.flatten(0, 1).to(ctx.dtype)
