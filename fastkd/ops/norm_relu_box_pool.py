"""norm_relu_box_pool: box_pool of relu(GroupNorm) (LGD's appearance encoder, methods 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.ops._support.checks import (
    check_boxes,
    check_device,
    check_kernel_dtype,
    check_levels,
    check_object_values,
    check_size,
)
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.registration import dense_like, register_with_backward
from fastkd.ops.box_pool import box_pool_reference

_DISPATCH = Dispatch("norm_relu_box_pool")


def norm_relu_box_pool_reference(
    levels: Sequence[Tensor], boxes: Tensor, image_index: Tensor, image_size: tuple[int, int], eps: float = 1e-5
) -> Tensor:
    """Plain torch of `norm_relu_box_pool`."""
    normalised = [F.relu(torch.group_norm(level, 1, eps=eps) if level.numel() else level) for level in levels]
    return box_pool_reference(normalised, boxes, image_index, image_size)


def norm_relu_box_pool(
    levels: Sequence[Tensor], boxes: Tensor, image_index: Tensor, image_size: tuple[int, int], eps: float = 1e-5
) -> Tensor:
    """Mean of relu(GroupNorm with one group, no affine) of every pyramid level over the cells each box covers.

    out[l, k] = mean over the cells of level l that box k covers (see `box_pool`) of max((x - mean) / sqrt(var + eps),
    0), mean and var (without Bessel's correction) over all channels and cells of the box's image; 0 where no cell is
    covered.

    Args:
        levels: L tensors [B, C, H_l, W_l] of one floating dtype, on one device; receive gradients.
        boxes: [K, 4] xyxy in pixels of the padded batch, clamped to [0, W - 1] x [0, H - 1]; no gradient.
        image_index: [K] int64 in [0, B).
        image_size: (H, W) of the padded batch, pixels.
        eps: added to the variance, >= 0.
    Returns: [L, K, C], dtype of levels.
    Raises: ValueError or TypeError if shapes, dtypes, devices or values are wrong; RuntimeError on double
        backward of the compiled kernel.
    Source: LGD (Zhang et al., AAAI 2022), appearance encoder.
    """
    _check(levels, boxes, image_index, image_size, eps)
    if _DISPATCH.compiled(levels[0]):
        arguments = list(levels), boxes.detach(), image_index, *image_size, float(eps)
        return torch.ops.fastkd.norm_relu_box_pool(*arguments)[0]
    return norm_relu_box_pool_reference(levels, boxes, image_index, image_size, eps)


def _check(levels, boxes, image_index, image_size, eps) -> None:
    op = "norm_relu_box_pool"
    check_levels(op, "levels", levels)
    check_kernel_dtype(op, "levels", levels[0])
    check_boxes(op, boxes, image_index)
    check_size(op, "image_size", image_size)
    check_device(op, "boxes", boxes, "levels", levels[0])
    check_object_values(op, image_index, levels[0].shape[0], boxes)
    if not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps!r}; 1e-5 is usual")


def _forward_fake(levels, boxes, image_index, height, width, eps) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if levels[0].dtype == torch.float64 else torch.float32
    shape = (len(levels), boxes.shape[0], levels[0].shape[1])
    return (
        levels[0].new_empty(shape),
        levels[0].new_empty((2, *shape), dtype=wide),
        levels[0].new_empty((2, len(levels), levels[0].shape[0]), dtype=torch.float64),
    )


def _backward_fake(grad, levels, boxes, image_index, height, width, kept, normal) -> list[Tensor]:
    return [dense_like(level) for level in levels]


def _setup_context(ctx, inputs, output) -> None:
    levels, boxes, image_index, ctx.height, ctx.width, _ = inputs
    _, kept, normal = output
    ctx.mark_non_differentiable(kept, normal)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*levels, boxes, image_index, kept, normal)


def _backward(ctx, grad: Tensor | None, grad_kept: None, grad_normal: None):
    *levels, boxes, image_index, kept, normal = ctx.saved_tensors
    gradients = [None] * len(levels)
    if grad is not None:
        gradients = torch.ops.fastkd.norm_relu_box_pool_backward(
            grad, levels, boxes, image_index, ctx.height, ctx.width, kept, normal
        )
    return gradients, None, None, None, None, None


if _DISPATCH.registered:
    register_with_backward(
        "norm_relu_box_pool",
        fake=_forward_fake,
        setup_context=_setup_context,
        backward=_backward,
        backward_fake=_backward_fake,
    )
