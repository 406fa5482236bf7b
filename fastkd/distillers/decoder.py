"""ICD's decoder: queries attend to the teacher's pyramid (methods 1.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.distillers.queries import AXIS_FEATURES, frequencies, mlp
from fastkd.ops import attention_mass, instance_attention
from fastkd.ops._support.coverage import full_precision


@dataclass
class Positions:
    """Sine-cosine position embeddings of a pyramid's rows and columns, all levels concatenated.

    Args:
        rows: [B, sum of H_l, 128] and columns: [B, sum of W_l, 128]; the embedding of a cell is [row | column].
        row_inside: [B, sum of H_l] bool and column_inside: [B, sum of W_l] bool, False in the padding.
        level_sizes: (H_l, W_l).
    """

    rows: Tensor
    columns: Tensor
    row_inside: Tensor
    column_inside: Tensor
    level_sizes: list[tuple[int, int]]


def valid_sizes(
    image_sizes: Tensor, padded_size: tuple[int, int], level_sizes: Sequence[tuple[int, int]]
) -> list[tuple[Tensor, Tensor]]:
    """Number of rows and columns of each level inside the image: L pairs of [B] float64.

    ceil(image size / stride), at most the level's; stride = mean of (padded height / H_l, padded width / W_l).
    """
    height, width = image_sizes.double().unbind(1)
    sizes = []
    for rows, columns in level_sizes:
        stride = (padded_size[0] / rows + padded_size[1] / columns) / 2
        sizes.append(((height / stride).ceil().clamp(max=rows), (width / stride).ceil().clamp(max=columns)))
    return sizes


def axis_positions(valid: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Embeddings [B, length, 128] of positions 1..length, and a mask [B, length] of positions <= `valid` [B].

    Sines and cosines, interleaved, of position / valid * frequency.
    """
    position = torch.arange(1, length + 1, dtype=torch.float32, device=valid.device)
    valid = valid.float()[:, None]
    angle = (position / valid)[..., None] * frequencies(valid.device)
    return torch.stack([angle.sin(), angle.cos()], dim=3).flatten(2), position <= valid


def position_embeddings(
    image_sizes: Tensor, padded_size: tuple[int, int], level_sizes: Sequence[tuple[int, int]]
) -> Positions:
    """Position embeddings of all levels, normalised by the part of a level that each image fills.

    Args:
        image_sizes: [B, 2] (height, width) before padding.
        padded_size: (H, W) of the batch.
        level_sizes: (H_l, W_l).
    """
    valid = valid_sizes(image_sizes, padded_size, level_sizes)
    axes = []
    for axis in (0, 1):
        parts = [axis_positions(each[axis], size[axis]) for each, size in zip(valid, level_sizes, strict=True)]
        axes.append([torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)])
    (rows, row_inside), (columns, column_inside) = axes
    return Positions(rows, columns, row_inside, column_inside, list(level_sizes))


@dataclass
class Attention:
    """The attention of a decoder layer; probabilities are not stored but recomputed for the sums that need them.

    Args:
        queries: [B, G, N, d], scaled by 1 / sqrt(d).
        levels: the teacher's pyramid, L tensors [B, C_teacher, H_l, W_l].
        key_weight: [C, C_teacher].
        row_bias, column_bias: L tensors [B, G, N, H_l] and [B, G, N, W_l].
        logsumexp: [B, G, N] of the logits.
        values: L tensors [B, C, H_l, W_l].
    """

    queries: Tensor
    levels: Sequence[Tensor]
    key_weight: Tensor
    row_bias: list[Tensor]
    column_bias: list[Tensor]
    logsumexp: Tensor
    values: list[Tensor]

    def mass(self, mask: Tensor, temperature: float = 1.0) -> list[Tensor]:
        """Attention summed over the masked queries, per head and cell: L tensors [B, G, H_l, W_l]; detached.

        Args:
            mask: [B, n] bool, for the first n queries.
        """
        count = mask.shape[1]
        return attention_mass(
            self.queries[:, :, :count],
            self.levels,
            self.key_weight,
            [bias[:, :, :count] for bias in self.row_bias],
            [bias[:, :, :count] for bias in self.column_bias],
            mask,
            self.logsumexp[:, :, :count] if temperature == 1 else None,
            temperature,
        )

    def maps(self, image: Tensor, query: Tensor) -> list[Tensor]:
        """Attention maps of single queries (image [K], query [K]): L tensors [K, G, H_l, W_l]; detached."""
        return attention_mass(
            self.queries[image, :, query][:, :, None],
            [level[image] for level in self.levels],
            self.key_weight,
            [bias[image, :, query][:, :, None] for bias in self.row_bias],
            [bias[image, :, query][:, :, None] for bias in self.column_bias],
            torch.ones(len(image), 1, dtype=torch.bool, device=image.device),
        )


def xavier_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weight and zero bias, the initialisation of attention projections."""
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def project_cells(linear: nn.Linear, levels: Sequence[Tensor]) -> list[Tensor]:
    """Apply a linear layer to every cell: L tensors [B, C, H_l, W_l] -> [B, C_out, H_l, W_l]."""
    return [F.conv2d(level, linear.weight[:, :, None, None], linear.bias) for level in levels]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, G * d] -> [B, G, N, d]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class DecoderLayer(nn.Module):
    """Attention of the queries to the teacher's pyramid and a feed-forward network, each with residual and LayerNorm.

    key_s = W_k (x_s + W_p pos_s + b_p) + b_k, value_s = W_v x_s + b_v. Under autocast the values have its dtype; all
    computations with queries stay in float32.

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
        """Queries [B, N, C] -> decoded queries [B, N, C] and their attention.

        Args:
            queries: receive gradients.
            levels: L tensors [B, teacher_channels, H_l, W_l]; frozen.
            positions: of the levels.
        """
        attended, attention = self.attend(queries, levels, positions)
        with full_precision(queries):
            decoded = self.norm_attention(queries + self.output(attended))
            return self.norm_feed_forward(decoded + self.feed_forward(decoded)), attention

    def attend(self, queries: Tensor, levels: Sequence[Tensor], positions: Positions) -> tuple[Tensor, Attention]:
        """Multi-head attention without its output projection: queries [B, N, C] -> [B, N, C] and the attention."""
        values = project_cells(self.value, levels)
        with full_precision(queries):
            query = split_heads(self.query(queries), self.heads)  # [B, G, N, d]
            query = query * query.shape[3] ** -0.5
            # softmax ignores b_k and b_p, which shift all logits of a query; DDP requires a gradient for them
            query = query + 0 * (self.key.bias.sum() + self.position.bias.sum())
            row_bias, column_bias = self.position_bias(query, positions)
            output, logsumexp = instance_attention(query, levels, self.key.weight, row_bias, column_bias, values)
        attention = Attention(query, levels, self.key.weight, row_bias, column_bias, logsumexp, values)
        return output.transpose(1, 2).flatten(2), attention

    def position_bias(self, query: Tensor, positions: Positions) -> tuple[list[Tensor], list[Tensor]]:
        """The position part of the logits: L tensors [B, G, N, H_l] for rows and L tensors [B, G, N, W_l] for columns.

        q . W_k W_p [row | column] = q . W_k W_p,row row + q . W_k W_p,column column: two small tables per level
        replace an embedding per cell. -inf in the padding of an image.
        """
        row_weight, column_weight = self.position.weight.split(AXIS_FEATURES, dim=1)  # [C_teacher, 128] each
        tables = []
        for embedding, weight, inside in (
            (positions.rows, row_weight, positions.row_inside),
            (positions.columns, column_weight, positions.column_inside),
        ):
            key = F.linear(F.linear(embedding.to(weight.dtype), weight), self.key.weight)
            bias = query @ split_heads(key, self.heads).transpose(2, 3)
            tables.append(bias.masked_fill(~inside[:, None, None], -math.inf))
        heights, widths = zip(*positions.level_sizes, strict=True)
        return list(tables[0].split(heights, dim=3)), list(tables[1].split(widths, dim=3))
