"""imitation_mask: the cells near objects where the student imitates the teacher (FGFI, methods 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.boxes import box_iou
from fastkd.ops._support.checks import (
    check_batch_size,
    check_boxes,
    check_device,
    check_kernel_dtype,
    check_object_values,
    check_size,
    check_tensor,
    values_at_hand,
)
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.registration import register

_DISPATCH = Dispatch("imitation_mask")


def _cell_anchors(anchors: Tensor, stride: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[H_l * W_l * A, 4]: the anchors of all cells, in row-major order."""
    y = torch.arange(size[0], device=anchors.device, dtype=anchors.dtype) * stride[0]
    x = torch.arange(size[1], device=anchors.device, dtype=anchors.dtype) * stride[1]
    shift = torch.stack([x.expand(size[0], -1), y[:, None].expand(-1, size[1])] * 2, dim=-1)  # [H_l, W_l, 4]
    return (shift[:, :, None] + anchors).flatten(0, 2)


@torch.no_grad()
def imitation_mask_reference(
    boxes: Tensor,
    image_index: Tensor,
    anchors: Sequence[Tensor],
    strides: Sequence[tuple[int, int]],
    batch_size: int,
    level_sizes: Sequence[tuple[int, int]],
    psi: float = 0.5,
) -> list[Tensor]:
    """Plain torch of `imitation_mask`, with the full IoU matrix."""
    if boxes.shape[0] == 0:
        return [boxes.new_zeros(batch_size, *size, dtype=torch.bool) for size in level_sizes]
    boxes = boxes.float()
    overlaps = [
        box_iou(boxes[:, None], _cell_anchors(base.float(), stride, size))
        .unflatten(1, (size[0] * size[1], -1))
        .amax(dim=2)
        for base, stride, size in zip(anchors, strides, level_sizes, strict=True)
    ]  # L x [K, S_l], the best anchor of each cell
    threshold = psi * torch.stack([overlap.amax(dim=1) for overlap in overlaps]).amax(dim=0)  # [K]
    masks = []
    for overlap, size in zip(overlaps, level_sizes, strict=True):
        votes = overlap.new_zeros(batch_size, overlap.shape[1])
        votes = votes.index_add(0, image_index, (overlap > threshold[:, None]).to(votes.dtype))
        masks.append((votes > 0).unflatten(1, tuple(size)))
    return masks


def imitation_mask(
    boxes: Tensor,
    image_index: Tensor,
    anchors: Sequence[Tensor],
    strides: Sequence[tuple[int, int]],
    batch_size: int,
    level_sizes: Sequence[tuple[int, int]],
    psi: float = 0.5,
) -> list[Tensor]:
    """Cells with an anchor whose IoU with some box exceeds psi times that box's best IoU with any anchor of any level.

    Args:
        boxes: [K, 4] xyxy in pixels of the padded batch.
        image_index: [K] int64 in [0, batch_size).
        anchors: L tensors [A, 4] xyxy, the anchors of the cell at the origin; those of cell (y, x) are shifted by
            (x * stride_x, y * stride_y) and not clipped to the image.
        strides: L pairs (stride_y, stride_x), pixels.
        batch_size: B.
        level_sizes: L pairs (H_l, W_l).
        psi: fraction of the best IoU, in [0, 1].
    Returns: L tensors [B, H_l, W_l] bool; nothing receives a gradient.
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree; on the CPU also if boxes or anchors are not
        finite or image_index is out of range.
    Source: FGFI (Wang et al., CVPR 2019), section 3.1.
    """
    _check(boxes, image_index, anchors, strides, batch_size, level_sizes, psi)
    if not _DISPATCH.compiled(boxes):
        return imitation_mask_reference(boxes, image_index, anchors, strides, batch_size, level_sizes, psi)
    return torch.ops.fastkd.imitation_mask(
        boxes.detach(),
        image_index,
        [base.detach() for base in anchors],
        [side for stride in strides for side in stride],
        batch_size,
        [side for size in level_sizes for side in size],
        float(psi),
    )


def _check(boxes, image_index, anchors, strides, batch_size, level_sizes, psi) -> None:
    op = "imitation_mask"
    check_boxes(op, boxes, image_index)
    check_kernel_dtype(op, "boxes", boxes)
    for name, value in (("anchors", anchors), ("strides", strides), ("level_sizes", level_sizes)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{op}: {name} must be a list, got {type(value).__name__}; pass one entry a level")
    if not len(anchors) == len(strides) == len(level_sizes) > 0:
        raise ValueError(
            f"{op}: anchors, strides and level_sizes must have one entry a level, at least one, got {len(anchors)}, "
            f"{len(strides)} and {len(level_sizes)}; pass all three for the same levels"
        )
    for index, (base, stride, size) in enumerate(zip(anchors, strides, level_sizes, strict=True)):
        _check_anchors(op, f"anchors[{index}]", base, boxes)
        check_size(op, f"strides[{index}]", stride)
        check_size(op, f"level_sizes[{index}]", size)
    check_batch_size(op, batch_size)
    if not isinstance(psi, (int, float)) or not 0 <= psi <= 1:
        raise ValueError(f"{op}: psi must be in [0, 1], got {psi}; 0.5 is the published value")
    check_object_values(op, image_index, batch_size, boxes)


def _check_anchors(op: str, name: str, base: object, boxes: Tensor) -> None:
    base = check_tensor(op, name, base, "[A, 4]", 2)
    check_kernel_dtype(op, name, base)
    if base.shape[0] < 1 or base.shape[1] != 4:
        raise ValueError(f"{op}: {name} must be [A, 4] with A >= 1, got {list(base.shape)}; pass xyxy anchors")
    check_device(op, name, base, "boxes", boxes)
    if values_at_hand(base) and not base.detach().isfinite().all():
        raise ValueError(f"{op}: {name} must be finite, got NaN or infinity; pass xyxy anchors in pixels")


def _fake(boxes, image_index, anchors, strides, batch_size, level_sizes, psi) -> list[Tensor]:
    sizes = zip(level_sizes[::2], level_sizes[1::2])
    return [boxes.new_empty((batch_size, *size), dtype=torch.bool) for size in sizes]


if _DISPATCH.registered:
    register("imitation_mask", fake=_fake)
