"""The ops in plain torch as a good engineer writes them without kernels: what `benchmarks.ops` compares with.

Every image has the same number of boxes here, so nothing is padded. Where two forms are obvious both are here, and the
faster one is the peer. tests/benchmarks/test_benchmarks.py holds them against the references.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

Size = tuple[int, int]


def instance_norm_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Torch's InstanceNorm of both, squared error over all levels."""
    errors = [
        F.mse_loss(F.instance_norm(ours), F.instance_norm(theirs), reduction="sum")
        for ours, theirs in zip(student, teacher)
    ]
    return sum(errors) / sum(level.numel() for level in student)


def box_cover(boxes: Tensor, image_size: Size, level_size: Size) -> Tensor:
    """Cells of a level that each box [K, 4] covers: [K, H_l, W_l] bool."""
    (height, width), (rows, columns) = image_size, level_size
    x1, x2 = (boxes[:, axis, None].clamp(0, width - 1) * columns / width for axis in (0, 2))
    y1, y2 = (boxes[:, axis, None].clamp(0, height - 1) * rows / height for axis in (1, 3))
    y, x = torch.arange(rows, device=boxes.device), torch.arange(columns, device=boxes.device)
    return ((y1 <= y) & (y <= y2))[:, :, None] & ((x1 <= x) & (x <= x2))[:, None, :]


def mask_cover(masks: Tensor, level_size: Size) -> Tensor:
    """Masks [K, H, W] bool at a level's size: [K, H_l, W_l] bool."""
    return F.interpolate(masks[:, None].float(), size=level_size, mode="nearest")[:, 0] > 0


def pool(levels: Sequence[Tensor], covers: Sequence[Tensor]) -> Tensor:
    """One product of covers and cells a level: L x [B, C, H_l, W_l], L x [B * K, H_l, W_l] -> [L, B * K, C]."""
    pooled = []
    for level, cover in zip(levels, covers):
        cover = cover.flatten(1).to(level.dtype).unflatten(0, (level.shape[0], -1))  # [B, K, S_l]
        total = cover @ level.flatten(2).transpose(1, 2)
        pooled.append((total / cover.sum(2, keepdim=True).clamp(min=1)).flatten(0, 1))
    return torch.stack(pooled)


def paint(embeddings: Tensor, covers: Sequence[Tensor], images: int) -> list[Tensor]:
    """One product of embeddings and covers a level: [L, B * K, C] -> L x [B, C, H_l, W_l]."""
    painted = []
    for embedding, cover in zip(embeddings, covers):
        rows = cover.flatten(1).to(embedding.dtype).unflatten(0, (images, -1))  # [B, K, S_l]
        sums = embedding.unflatten(0, (images, -1)).transpose(1, 2) @ rows
        painted.append(sums.unflatten(2, cover.shape[1:]))
    return painted


def box_pool_masks(levels: Sequence[Tensor], boxes: Tensor, image_size: Size) -> Tensor:
    """Means over boxes by masks and matrix products."""
    return pool(levels, [box_cover(boxes, image_size, level.shape[2:]) for level in levels])


def cell_ranges(boxes: Tensor, image_size: Size, level_size: Size) -> list[tuple[int, int, int, int]]:
    """First and one past the last covered row and column of each box, as Python ints (waits for the device)."""
    cover = box_cover(boxes, image_size, level_size)
    rows, columns = cover.any(2).int(), cover.any(1).int()
    first, last = ([side.argmax(1) for side in (rows, columns)], [side.sum(1) for side in (rows, columns)])
    return torch.stack([first[0], first[0] + last[0], first[1], first[1] + last[1]], dim=1).tolist()


def box_pool_slices(levels: Sequence[Tensor], boxes: Tensor, image_size: Size) -> Tensor:
    """Means over boxes by one slice for each box and level."""
    pooled, share = [], boxes.shape[0] // levels[0].shape[0]
    for level in levels:
        ranges = cell_ranges(boxes, image_size, level.shape[2:])
        for k, (top, bottom, left, right) in enumerate(ranges):
            cells = level[k // share, :, top:bottom, left:right]
            pooled.append(cells.sum((1, 2)) / max(cells[0].numel(), 1))
    return torch.stack(pooled).unflatten(0, (len(levels), -1))


def box_paint_masks(
    embeddings: Tensor, boxes: Tensor, image_size: Size, images: int, level_sizes: Sequence[Size]
) -> list[Tensor]:
    """Painting by masks and matrix products."""
    return paint(embeddings, [box_cover(boxes, image_size, size) for size in level_sizes], images)


def box_paint_slices(
    embeddings: Tensor, boxes: Tensor, image_size: Size, images: int, level_sizes: Sequence[Size]
) -> list[Tensor]:
    """Painting by adding to one slice for each box and level."""
    painted, share = [], boxes.shape[0] // images
    for embedding, size in zip(embeddings, level_sizes):
        level = embedding.new_zeros(images, embedding.shape[1], *size)
        for k, (top, bottom, left, right) in enumerate(cell_ranges(boxes, image_size, size)):
            level[k // share, :, top:bottom, left:right] += embedding[k, :, None, None]
        painted.append(level)
    return painted


def box_paint_conv3x3(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    boxes: Tensor,
    image_size: Size,
    images: int,
    level_sizes: Sequence[Size],
) -> list[Tensor]:
    """Painting, then torch's convolution."""
    painted = box_paint_masks(embeddings, boxes, image_size, images, level_sizes)
    return [F.conv2d(level, weight, bias, padding=1) for level in painted]


def norm_relu_box_pool(levels: Sequence[Tensor], boxes: Tensor, image_size: Size) -> Tensor:
    """Torch's GroupNorm and ReLU, then `box_pool_masks`."""
    return box_pool_masks([F.relu(F.group_norm(level, 1)) for level in levels], boxes, image_size)


def mask_pool(levels: Sequence[Tensor], masks: Tensor) -> Tensor:
    """Means over resized masks."""
    return pool(levels, [mask_cover(masks, level.shape[2:]) for level in levels])


def mask_paint(embeddings: Tensor, masks: Tensor, images: int, level_sizes: Sequence[Size]) -> list[Tensor]:
    """Painting on resized masks."""
    return paint(embeddings, [mask_cover(masks, size) for size in level_sizes], images)


def cells_of(levels: Sequence[Tensor]) -> Tensor:
    """The cells of all levels in a row, channels last: [B, S, C]."""
    return torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)


def split_heads(cells: Tensor, heads: int) -> Tensor:
    """[B, S, G * d] -> [B, G, S, d]."""
    return cells.unflatten(2, (heads, -1)).transpose(1, 2)


def keys(
    levels: Sequence[Tensor], key_weight: Tensor, rows: Sequence[Tensor], columns: Sequence[Tensor], heads: int
) -> Tensor:
    """Keys [B, G, S, d] of features with the position embedding added; rows [H_l, C], columns [W_l, C]."""
    placed = [level + (row[:, None] + column).permute(2, 0, 1) for level, row, column in zip(levels, rows, columns)]
    return split_heads(F.linear(cells_of(placed), key_weight), heads)


def attention_matmul(queries, levels, key_weight, rows, columns, values) -> Tensor:
    """Attention by product, softmax and product: [B, G, N, d]."""
    key = keys(levels, key_weight, rows, columns, queries.shape[1])
    return (queries @ key.transpose(2, 3)).softmax(3) @ split_heads(cells_of(values), queries.shape[1])


def attention_fused(queries, levels, key_weight, rows, columns, values) -> Tensor:
    """The same by torch's fused attention."""
    key = keys(levels, key_weight, rows, columns, queries.shape[1])
    return F.scaled_dot_product_attention(queries, key, split_heads(cells_of(values), queries.shape[1]), scale=1.0)


def decoder_attention(queries, levels, weights, positions: Tensor, heads: int, fused: bool) -> Tensor:
    """ICD's decoder attention as published: projections of queries, keys with positions, values; [B, N, C].

    Args:
        queries: [B, N, C]. levels: L tensors [B, C, H_l, W_l].
        weights: weight and bias of the query, key, value and position projections, in that order.
        positions: [B, S, 256] sines and cosines.
    """
    query_w, query_b, key_w, key_b, value_w, value_b, position_w, position_b = weights
    cells = cells_of(levels)
    query = split_heads(F.linear(queries, query_w, query_b), heads)
    key = split_heads(F.linear(cells + F.linear(positions, position_w, position_b), key_w, key_b), heads)
    value = split_heads(F.linear(cells, value_w, value_b), heads)
    if fused:
        output = F.scaled_dot_product_attention(query, key, value)
    else:
        output = (query * query.shape[3] ** -0.5 @ key.transpose(2, 3)).softmax(3) @ value
    return output.transpose(1, 2).flatten(2)


def value_mimic(student: Sequence[Tensor], teacher: Sequence[Tensor], mass: Tensor) -> Tensor:
    """Torch's LayerNorm over each head, squared error weighted by the mass [B, G, S]: [B, G]."""
    heads = mass.shape[1]
    value, target = (split_heads(cells_of(levels), heads) for levels in (student, teacher))  # [B, G, S, d]
    value, target = (F.layer_norm(side, side.shape[3:]) for side in (value, target))
    error = (value - target).square().mean(3)
    return (mass * error).sum(2) / mass.sum(2).clamp(min=1e-6)


def mass_and_mimic(queries, levels, key_weight, rows, columns, student, teacher) -> Tensor:
    """Attention mass of the real queries, then `value_mimic`: [B, G]."""
    with torch.no_grad():
        key = keys(levels, key_weight, rows, columns, queries.shape[1])
        mass = (queries @ key.transpose(2, 3)).softmax(3).sum(2)
    return value_mimic(student, teacher, mass)


@torch.no_grad()
def imitation_mask(
    boxes: Tensor,
    anchors: Sequence[Tensor],
    strides: Sequence[Size],
    images: int,
    level_sizes: Sequence[Size],
    psi: float = 0.5,
) -> list[Tensor]:
    """All anchors, torchvision's IoU of them and the boxes, thresholds: L x [B, H_l, W_l] bool."""
    shifted = []
    for base, stride, size in zip(anchors, strides, level_sizes):
        y, x = (torch.arange(side, device=base.device) * step for side, step in zip(size, stride))
        y, x = torch.meshgrid(y, x, indexing="ij")
        shifted.append((torch.stack([x, y, x, y], dim=2)[:, :, None] + base).flatten(0, 2))
    overlap = box_iou(boxes, torch.cat(shifted))  # [B * K, anchors]
    hit = (overlap > psi * overlap.amax(1, keepdim=True)).unflatten(0, (images, -1)).any(1)
    parts = hit.split([len(part) for part in shifted], dim=1)
    return [part.unflatten(1, (*size, -1)).any(3) for part, size in zip(parts, level_sizes)]


def masked_mse_product(
    student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Squared errors times the mask, and the number of masked cells."""
    errors = [((s - t).square() * mask[:, None]).sum() for s, t, mask in zip(student, teacher, masks)]
    return sum(errors), sum(mask.sum() for mask in masks).float()


def masked_mse_selected(
    student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Squared errors of the selected cells (waits for the device)."""
    errors = []
    for ours, theirs, mask in zip(student, teacher, masks):
        ours, theirs = (level.permute(0, 2, 3, 1)[mask] for level in (ours, theirs))
        errors.append((ours - theirs).square().sum())
    return sum(errors), sum(mask.sum() for mask in masks).float()
