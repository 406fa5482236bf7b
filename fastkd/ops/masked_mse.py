"""masked_mse: squared error over masked cells, and their number (FGFI, methods 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops._support.checks import check_device, check_kernel_dtype, check_levels, check_same_sizes, check_tensor
from fastkd.ops._support.coverage import full_precision, widen
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.registration import dense_like, register_with_backward

_DISPATCH = Dispatch("masked_mse")


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

    Both are returned, instead of their quotient, so that the caller can divide by the count over all processes.

    Args:
        student: L tensors [B, C, H_l, W_l], floating point; receive gradients, 0 outside the mask.
        teacher: L tensors of the same shapes; no gradient. Where its dtype differs, the narrower one is widened.
        masks: L tensors [B, H_l, W_l] bool.
    Returns: error and count, scalars, float32 (float64 if any argument is).
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree; RuntimeError on double backward of the
        compiled kernel.
    Source: FGFI (Wang et al., CVPR 2019), section 3.2.
    """
    _check(student, teacher, masks)
    if not _DISPATCH.compiled(student[0]):
        return masked_mse_reference(student, teacher, masks)
    dtype = torch.promote_types(student[0].dtype, teacher[0].dtype)
    ours, theirs = [level.to(dtype) for level in student], [level.detach().to(dtype) for level in teacher]
    return torch.ops.fastkd.masked_mse(ours, theirs, list(masks))


def _check(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    op = "masked_mse"
    check_levels(op, "student", student)
    check_levels(op, "teacher", teacher)
    for name, levels in (("student", student), ("teacher", teacher)):
        check_kernel_dtype(op, name, levels[0])
    if teacher[0].shape[1] != student[0].shape[1]:
        raise ValueError(
            f"{op}: teacher must have the student's {student[0].shape[1]} channels, got {teacher[0].shape[1]}; "
            "adapt the student to the teacher's width"
        )
    check_same_sizes(op, "teacher", teacher, "student", student)
    check_device(op, "teacher", teacher[0], "student", student[0])
    if not isinstance(masks, (list, tuple)):
        raise TypeError(f"{op}: masks must be a list of [B, H_l, W_l] tensors, got {type(masks).__name__}; list them")
    if len(masks) != len(student):
        raise ValueError(f"{op}: masks must hold {len(student)} levels, got {len(masks)}; pass one for each level")
    for index, (mask, level) in enumerate(zip(masks, student, strict=True)):
        check_tensor(op, f"masks[{index}]", mask, "[B, H_l, W_l]", 3, floating=False)
        expected = (level.shape[0], *level.shape[2:])
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ValueError(
                f"{op}: masks[{index}] must be bool {list(expected)}, got {mask.dtype} {list(mask.shape)}; "
                "pass one flag for each cell"
            )
        check_device(op, f"masks[{index}]", mask, "student", level)


def _forward_fake(student, teacher, masks) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if student[0].dtype == torch.float64 else torch.float32
    return student[0].new_empty((), dtype=dtype), student[0].new_empty((), dtype=dtype)


def _backward_fake(grad, student, teacher, masks) -> list[Tensor]:
    return [dense_like(level) for level in student]


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, masks = inputs
    ctx.levels = len(student)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*student, *teacher, *masks)


def _backward(ctx, grad: Tensor | None, grad_count: None):
    none = [None] * ctx.levels
    if grad is None or not any(ctx.needs_input_grad[0]):
        return none, none, none
    saved = ctx.saved_tensors
    student, teacher, masks = (list(saved[start * ctx.levels : (start + 1) * ctx.levels]) for start in range(3))
    return torch.ops.fastkd.masked_mse_backward(grad, student, teacher, masks), none, none


if _DISPATCH.registered:
    register_with_backward(
        "masked_mse",
        fake=_forward_fake,
        setup_context=_setup_context,
        backward=_backward,
        backward_fake=_backward_fake,
    )
