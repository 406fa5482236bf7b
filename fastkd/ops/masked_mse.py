"""masked_mse: squared error over chosen cells, with its normaliser (FGFI, methods 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops.checks import check_levels, check_same_sizes, check_tensor
from fastkd.ops.coverage import full_precision, widen


def masked_mse_reference(
    student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Plain torch of `masked_mse`."""
    with full_precision(student[0]):
        error = torch.stack(
            [
                torch.where(mask[:, None], widen(ours) - widen(theirs.detach()), 0.0).square().sum()
                for ours, theirs, mask in zip(student, teacher, masks, strict=True)
            ]
        ).sum()
        count = torch.stack([mask.sum() for mask in masks]).sum()
        return error, count.to(error.dtype)


def masked_mse(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of (student - teacher)^2 over the masked cells and all channels, and the number of masked cells.

    Two numbers instead of their quotient, so that the caller can divide by the cells of all processes.

    Args:
        student: L tensors [B, C, H_l, W_l], floating point; receive gradients.
        teacher: L tensors of the same shapes; no gradient.
        masks: L tensors [B, H_l, W_l] bool.
    Returns: error and count, scalars, float32 (float64 of float64).
    Raises: ValueError or TypeError if shapes or dtypes disagree.
    Source: FGFI (Wang et al., CVPR 2019), section 3.2.
    """
    check_levels("masked_mse", "student", student)
    check_levels("masked_mse", "teacher", teacher, channels=student[0].shape[1])
    check_same_sizes("masked_mse", "teacher", teacher, "student", student)
    if len(masks) != len(student):
        raise ValueError(
            f"masked_mse: masks must hold {len(student)} levels, got {len(masks)}; pass one for each level"
        )
    for index, (mask, level) in enumerate(zip(masks, student, strict=True)):
        check_tensor("masked_mse", f"masks[{index}]", mask, "[B, H_l, W_l]", 3, floating=False)
        expected = (level.shape[0], *level.shape[2:])
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ValueError(
                f"masked_mse: masks[{index}] must be bool {list(expected)}, got {mask.dtype} "
                f"{list(mask.shape)}; pass one flag for each cell"
            )
    return masked_mse_reference(student, teacher, masks)
