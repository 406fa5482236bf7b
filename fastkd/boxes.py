"""Area, intersection and IoU of xyxy boxes."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_UNION = 1e-12  # gives boxes without area an IoU of 0


@torch.no_grad()
def box_intersection(boxes: Tensor, others: Tensor) -> Tensor:
    """Area of the intersection of boxes [..., 4] with others [..., 4], broadcast: all pairs of [K, 4] and [M, 4] are
    `box_intersection(boxes[:, None], others)`, [K, M]. No gradient.
    """
    (x1, y1, x2, y2), (a1, b1, a2, b2) = boxes.unbind(-1), others.unbind(-1)
    width = (torch.minimum(x2, a2) - torch.maximum(x1, a1)).clamp_(min=0)
    return width.mul_((torch.minimum(y2, b2) - torch.maximum(y1, b1)).clamp_(min=0))


@torch.no_grad()
def box_area(boxes: Tensor) -> Tensor:
    """Width times height of boxes [..., 4]; 0 for inverted ones. No gradient."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp_(min=0).prod(-1)


@torch.no_grad()
def box_iou(boxes: Tensor, others: Tensor, eps: float = 0.0) -> Tensor:
    """Intersection / (union + eps) of boxes [..., 4] with others [..., 4], broadcast as in `box_intersection`.

    0 for boxes without area. No gradient.
    """
    overlap = box_intersection(boxes, others)
    union = (box_area(boxes) + box_area(others)).sub_(overlap)
    return overlap.div_((union.add_(eps) if eps else union).clamp_(min=_SMALLEST_UNION))
