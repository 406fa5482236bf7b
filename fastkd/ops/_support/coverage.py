"""Plain torch shared by the references: precision, flattened pyramids, and sums over the cells of objects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def full_precision(value: Tensor) -> torch.autocast:
    """Context without autocast on the device of value: references accumulate in float32."""
    return torch.autocast(value.device.type, enabled=False)


def widen(value: Tensor) -> Tensor:
    """Cast half types to float32; wider types are unchanged."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def flatten_pyramid(levels: Sequence[Tensor]) -> Tensor:
    """[B, C, S]: the cells of all levels concatenated, float32 or wider."""
    return torch.cat([widen(level).flatten(2) for level in levels], dim=2)


def box_cover(boxes: Tensor, image_size: tuple[int, int], level_size: Sequence[int]) -> Tensor:
    """Cells (y, x) with y1 * H_l / H <= y <= y2 * H_l / H, likewise x; corners clamped to the image, in float32.

    Args: boxes [K, 4] xyxy pixels; image_size (H, W); level_size (H_l, W_l).
    Returns: [K, H_l, W_l] bool.
    """
    (height, width), (rows, columns) = image_size, level_size
    x1, y1, x2, y2 = boxes.detach().float().unbind(-1)
    y = torch.arange(rows, device=boxes.device, dtype=torch.float32)
    x = torch.arange(columns, device=boxes.device, dtype=torch.float32)
    # Division by a Python number is a multiplication by its reciprocal on a GPU, which changes cells at box edges.
    low_y, high_y = (side.clamp(0, height - 1) * rows / side.new_full((), height) for side in (y1, y2))
    low_x, high_x = (side.clamp(0, width - 1) * columns / side.new_full((), width) for side in (x1, x2))
    row = (low_y[:, None] <= y) & (y <= high_y[:, None])  # [K, H_l]
    column = (low_x[:, None] <= x) & (x <= high_x[:, None])  # [K, W_l]
    return row[:, :, None] & column[:, None, :]


def mask_cover(masks: Tensor, level_size: Sequence[int]) -> Tensor:
    """Masks [K, H, W] bool resized to [K, H_l, W_l] by nearest neighbour: cell y reads row floor(y * H / H_l)."""
    rows, columns = level_size
    y = torch.arange(rows, device=masks.device) * masks.shape[1] // rows
    x = torch.arange(columns, device=masks.device) * masks.shape[2] // columns
    return masks[:, y[:, None], x]


def _incidence(cover: Tensor, image_index: Tensor, batch_size: int, dtype: torch.dtype) -> Tensor:
    """[K, B * S]: 1 where object k covers cell s of image b."""
    in_image = image_index[:, None] == torch.arange(batch_size, device=image_index.device)  # [K, B]
    return (in_image[:, :, None] & cover.flatten(1)[:, None, :]).flatten(1).to(dtype)


def pool_cover(level: Tensor, cover: Tensor, image_index: Tensor) -> Tensor:
    """Mean [K, C] of level [B, C, H_l, W_l] over each object's cells, 0 where it covers none."""
    with full_precision(level):
        cells = widen(level).permute(0, 2, 3, 1).flatten(0, 2)  # [B * S, C]
        total = _incidence(cover, image_index, level.shape[0], cells.dtype) @ cells
        return (total / cover.flatten(1).sum(1).clamp(min=1)[:, None]).to(level.dtype)


def paint_cover(embedding: Tensor, cover: Tensor, image_index: Tensor, batch_size: int) -> Tensor:
    """Map [B, C, H_l, W_l] (channels-last) whose cells sum the embeddings [K, C] of the objects that cover them."""
    with full_precision(embedding):
        incidence = _incidence(cover, image_index, batch_size, widen(embedding).dtype)
        painted = incidence.t() @ widen(embedding)  # [B * S, C]
        painted = painted.unflatten(0, (batch_size, *cover.shape[1:])).permute(0, 3, 1, 2)
        return painted.to(embedding.dtype)
