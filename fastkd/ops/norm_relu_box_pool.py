"""norm_relu_box_pool: box_pool of relu(GroupNorm) (LGD's appearance encoder, methods 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from fastkd.ops.box_pool import box_pool_reference
from fastkd.ops.checks import check_boxes, check_device, check_levels, check_size


def norm_relu_box_pool_reference(
    levels: Sequence[Tensor], boxes: Tensor, image_index: Tensor, image_size: tuple[int, int], eps: float = 1e-5
) -> Tensor:
    """Plain torch of `norm_relu_box_pool`."""
    normalised = [F.relu(F.group_norm(level, 1, eps=eps)) for level in levels]
    return box_pool_reference(normalised, boxes, image_index, image_size)


def norm_relu_box_pool(
    levels: Sequence[Tensor], boxes: Tensor, image_index: Tensor, image_size: tuple[int, int], eps: float = 1e-5
) -> Tensor:
    """Mean of relu(GroupNorm with one group, no affine) of every pyramid level over the cells each box covers.

    Args:
        levels: L tensors [B, C, H_l, W_l], floating point; receive gradients.
        boxes: [K, 4] xyxy in pixels of the padded batch, clamped to [0, W - 1] x [0, H - 1]; no gradient.
        image_index: [K] int64 in [0, B).
        image_size: (H, W) of the padded batch, pixels.
        eps: added to the variance.
    Returns: [L, K, C], dtype of levels.
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree.
    Source: LGD (Zhang et al., AAAI 2022), appearance encoder.
    """
    check_levels("norm_relu_box_pool", "levels", levels)
    check_boxes("norm_relu_box_pool", boxes, image_index)
    check_size("norm_relu_box_pool", "image_size", image_size)
    check_device("norm_relu_box_pool", "boxes", boxes, "levels", levels[0])
    return norm_relu_box_pool_reference(levels, boxes, image_index, image_size, eps)
