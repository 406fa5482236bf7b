"""ICD's decoder: queries attend to the teacher's pyramid (methods 1.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.distillers.icd_queries import AXIS_FEATURES, mlp, sine_frequencies
from fastkd.ops import attention_mass, instance_attention
from fastkd.ops.coverage import full_precision


def valid_sizes(
    image_sizes: Tensor, padded_size: tuple[int, int], level_sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Rows and columns of each level that lie in the image: L tensors [B, 2] int64.

    ceil(image size / stride), at most the level's; stride = mean of (padded height / H_l, padded width / W_l).
    """
    sizes = []
    for rows, columns in level_sizes:
        stride = (padded_size[0] / rows + padded_size[1] / columns) / 2
        size = (image_sizes.double() / stride).ceil().long()
        sizes.append(torch.stack([size[:, 0].clamp(1, rows), size[:, 1].clamp(1, columns)], dim=1))
    return sizes


def _axis_table(valid: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Sines and cosines [B, length, 128] of places 1..valid scaled to 2 pi, and which places are inside [B, length]."""
    place = torch.arange(1, length + 1, device=valid.device)
    angle = (place / valid[:, None] * 2 * math.pi)[..., None] * sine_frequencies(valid.device)  # [B, length, 64]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2), place <= valid[:, None]


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
    def of(cls, image_sizes: Tensor, padded_size: tuple[int, int], level_sizes: Sequence[tuple[int, int]]) -> Positions:
        """The embeddings of these images (image_sizes [B, 2]) on levels of these sizes."""
        sizes = valid_sizes(image_sizes, padded_size, level_sizes)
        rows = [_axis_table(size[:, 0], height) for size, (height, _) in zip(sizes, level_sizes, strict=True)]
        columns = [_axis_table(size[:, 1], width) for size, (_, width) in zip(sizes, level_sizes, strict=True)]
        heights, widths = zip(*level_sizes, strict=True)
        tables = [torch.cat(part, dim=1) for part in (*zip(*rows, strict=True), *zip(*columns, strict=True))]
        return cls(tables[0], tables[2], tables[1], tables[3], list(heights), list(widths))

    def bias(self, queries: Tensor, constant: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Row biases (with the constant added) [B, G, N, H_l] and column biases [B, G, N, W_l] of every level.

        queries [B, G, N, 256] = what multiplies [row part | column part]; constant [B, G, N]; -inf outside the image.
        """
        row, column = queries.split(AXIS_FEATURES, dim=3)
        by_row = torch.einsum("bgnp,bhp->bgnh", row, self.rows.to(row)) + constant[..., None]
        by_column = torch.einsum("bgnp,bwp->bgnw", column, self.columns.to(row))
        by_row = by_row.masked_fill(~self.row_inside[:, None, None], -math.inf)
        by_column = by_column.masked_fill(~self.column_inside[:, None, None], -math.inf)
        return list(by_row.split(self.heights, dim=3)), list(by_column.split(self.widths, dim=3))


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
    """

    queries: Tensor
    levels: Sequence[Tensor]
    key_weight: Tensor
    row_bias: list[Tensor]
    column_bias: list[Tensor]
    values: list[Tensor]
    logsumexp: Tensor

    def mass(self, chosen: Tensor, temperature: float = 1.0) -> list[Tensor]:
        """Attention mass [B, G, H_l, W_l] of the chosen [B, n] among the first n queries; detached."""
        count = chosen.shape[1]
        return attention_mass(
            self.queries[:, :, :count],
            self.levels,
            self.key_weight,
            [table[:, :, :count] for table in self.row_bias],
            [table[:, :, :count] for table in self.column_bias],
            chosen,
            self.logsumexp[:, :, :count] if temperature == 1 else None,
            temperature,
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


def project_levels(linear: nn.Linear, levels: Sequence[Tensor]) -> list[Tensor]:
    """The linear applied to every cell: L tensors [B, C, H_l, W_l] -> [B, outputs, H_l, W_l]."""
    return [F.conv2d(level, linear.weight[:, :, None, None], linear.bias) for level in levels]


class DecoderLayer(nn.Module):
    """Attention of the queries over the teacher's pyramid and a feed-forward, each with residual and LayerNorm.

    key_s = W_k (x_s + W_p pos_s + b_p) + b_k, value_s = W_v x_s + b_v; b_k and b_p move all logits of a query alike, so
    their gradient is zero up to rounding.

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

    def forward(self, queries: Tensor, levels: Sequence[Tensor], positions: Positions) -> tuple[Tensor, Attention]:
        """Queries [B, N, C] -> decoded queries [B, N, C] and their attention."""
        attention_output, attention = self.attend(queries, levels, positions)
        decoded = self.norm_attention(queries + self.output(attention_output))
        return self.norm_feed_forward(decoded + self.feed_forward(decoded)), attention

    def attend(self, queries: Tensor, levels: Sequence[Tensor], positions: Positions) -> tuple[Tensor, Attention]:
        """Queries [B, N, C] -> concatenated heads [B, N, C] and the attention."""
        projected = self.query(queries).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, G, N, d]
        projected = projected * projected.shape[3] ** -0.5
        row_bias, column_bias = self._tables(projected, positions)
        values = project_levels(self.value, levels)
        output, logsumexp = instance_attention(projected, levels, self.key.weight, row_bias, column_bias, values)
        attention = Attention(projected, levels, self.key.weight, row_bias, column_bias, values, logsumexp)
        return output.transpose(1, 2).flatten(2), attention

    def _tables(self, projected: Tensor, positions: Positions) -> tuple[list[Tensor], list[Tensor]]:
        with full_precision(projected):
            projected = projected.to(self.key.weight.dtype)
            weight = self.key.weight.unflatten(0, (self.heads, -1))  # [G, d, C_teacher]
            absorbed = torch.einsum("bgnd,gdc->bgnc", projected, weight)
            constant = absorbed @ self.position.bias
            constant = constant + (projected * self.key.bias.unflatten(0, (self.heads, 1, -1))).sum(3)
            return positions.bias(absorbed @ self.position.weight, constant)
