"""ICD as one writes it from the paper in plain torch: what `benchmarks.step` compares with.

Eager: position embeddings of every cell, keys and values of all levels in a row, attention by product, softmax and
product; its weights summed over the real queries are the mass. It computes with the parameters of an `ICD`, so that
tests can ask for equal losses, and takes the same random queries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ops import peers
from fastkd.distillers import ICD
from fastkd.distillers.queries import Queries
from fastkd.types import Batch

Size = tuple[int, int]


def frequencies(features: int = 128) -> Tensor:
    """[features / 2]: 10000 ^ -(2 i / features)."""
    return 10000 ** -(torch.arange(0, features, 2) / features)


def positions(batch: Batch, sizes: list[Size]) -> tuple[Tensor, Tensor]:
    """Sines and cosines [B, S, 256] of every cell's place in its image, and which cells are inside [B, S]."""
    embedded, inside = [], []
    for rows, columns in sizes:
        stride = (batch.padded_size[0] / rows + batch.padded_size[1] / columns) / 2
        valid = (batch.image_sizes.double() / stride).ceil()
        valid = torch.minimum(valid.clamp(min=1), torch.tensor([rows, columns])).float()  # [B, 2]
        y, x = torch.arange(1, rows + 1), torch.arange(1, columns + 1)
        y_part, x_part = (
            (place / valid[:, axis, None] * 2 * math.pi)[..., None] * frequencies() for axis, place in enumerate((y, x))
        )
        y_part, x_part = (torch.stack([part.sin(), part.cos()], dim=3).flatten(2) for part in (y_part, x_part))
        whole = [y_part[:, :, None].expand(-1, -1, columns, -1), x_part[:, None].expand(-1, rows, -1, -1)]
        embedded.append(torch.cat(whole, dim=3).flatten(1, 2))
        inside.append(((y <= valid[:, :1])[:, :, None] & (x <= valid[:, 1:])[:, None]).flatten(1))
    return torch.cat(embedded, dim=1), torch.cat(inside, dim=1)


def encode(icd: ICD, queries: Queries) -> Tensor:
    """Query vectors [B, N, C]."""
    one_hot = F.one_hot(queries.labels, icd.encoder.num_classes).float()
    angle = 2 * math.pi * queries.anchors[..., None] * frequencies()
    anchor = torch.cat([angle.sin(), angle.cos()], dim=3).flatten(2)
    scale = (queries.pixels.log() * 1.44 - 5).clamp(0, 4).floor().long()
    return icd.encoder.layers(torch.cat([one_hot, anchor, F.one_hot(scale, 5).flatten(2).float()], dim=2))


def auxiliary_losses(outputs: Tensor, queries: Queries) -> tuple[Tensor, Tensor]:
    """Identification and localisation."""
    real, valid = queries.real, queries.valid
    identification = F.binary_cross_entropy_with_logits(outputs[..., 0][valid], real[valid].float())
    sides, boxes, anchors = outputs[..., 1:].sigmoid()[real], queries.boxes[real], queries.anchors[real]
    if len(boxes) == 0:
        return identification, outputs.sum() * 0
    target = torch.cat([anchors - boxes[:, :2], boxes[:, 2:] - anchors], dim=1)
    extent = (target[:, :2] + target[:, 2:]).clamp(min=1e-7).repeat(1, 2)
    return identification, ((sides - target).abs() / extent).sum(1).mean()


class PlainICD(nn.Module):
    """`ICD`'s forward in plain torch.

    Args:
        icd: whose parameters it uses; temperature 1.
    """

    def __init__(self, icd: ICD):
        super().__init__()
        self.icd = icd

    def forward(self, student: list[Tensor], teacher: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The three losses."""
        icd, queries = self.icd, self.icd.queries(batch)
        cells, own = peers.cells_of(teacher), peers.cells_of(student)  # [B, S, C]
        place, inside = positions(batch, [tuple(level.shape[2:]) for level in teacher])
        decoded = encode(icd, queries)
        losses = [0.0, 0.0, 0.0]
        for layer, projection in zip(icd.decoder, icd.student_values):
            query = peers.split_heads(layer.query(decoded), layer.heads)
            key = peers.split_heads(layer.key(cells + layer.position(place)), layer.heads)
            value = peers.split_heads(layer.value(cells), layer.heads)
            logits = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
            attention = logits.masked_fill(~inside[:, None, None], -math.inf).softmax(dim=3)  # [B, G, N, S]
            answer = layer.output((attention @ value).transpose(1, 2).flatten(2))
            decoded = layer.norm_attention(decoded + answer)
            decoded = layer.norm_feed_forward(decoded + layer.feed_forward(decoded))
            auxiliary = auxiliary_losses(icd.auxiliary(decoded), queries)
            mass = (attention.detach() * queries.real[:, None, :, None]).sum(dim=2)
            mimic = self.mimic(peers.split_heads(projection(own), layer.heads), value.detach(), mass)
            losses = [total + loss for total, loss in zip(losses, (*auxiliary, mimic))]
        distill = icd.weight * losses[2] / len(icd.decoder)
        return {"icd_identification": losses[0], "icd_localisation": losses[1], "icd_distill": distill}

    def mimic(self, value: Tensor, target: Tensor, mass: Tensor) -> Tensor:
        """Weighted squared error of normalised values [B, G, S, d]."""
        value, target = (F.layer_norm(side, side.shape[3:]) for side in (value, target))
        error = (value - target).square().mean(dim=3)
        return ((mass * error).sum(dim=2) / mass.sum(dim=2).clamp(min=1e-6)).mean()
