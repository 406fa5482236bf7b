"""instance_norm_mse: mean squared error between two instance-normalised pyramids, LGD's distillation loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops._support.checks import check_device, check_kernel_dtype, check_levels
from fastkd.ops._support.coverage import full_precision, widen
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.registration import dense_like, register_with_backward

_DISPATCH = Dispatch("instance_norm_mse")
_MOMENTS = 10  # values that the forward kernel saves per row


def _normalise(level: Tensor, eps: float) -> Tensor:
    level = widen(level)
    centred = level - level.mean((2, 3), keepdim=True)
    return centred * (centred.square().mean((2, 3), keepdim=True) + eps).rsqrt()


def instance_norm_mse_reference(student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """Plain torch of `instance_norm_mse`."""
    with full_precision(student[0]):
        squares = ((_normalise(s, eps) - _normalise(t, eps)).square().sum() for s, t in zip(student, teacher))
        return sum(squares, student[0].new_zeros(())) / max(sum(level.numel() for level in student), 1)


def instance_norm_mse(student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """Mean squared error between two pyramids after instance normalisation.

    loss = mean over all elements of all levels of (IN(student) - IN(teacher))^2, IN(x) = (x - mean) / sqrt(var + eps)
    over the cells of a channel, var without Bessel's correction. Levels of one cell, and empty pyramids, contribute 0.

    Args:
        student: L tensors [B, C, H_l, W_l] of one floating dtype, on one device; receive gradients.
        teacher: the same shapes and device; receive gradients (detach it for distillation). Where its dtype differs,
            the narrower one is widened.
        eps: added to the variance, >= 0.
    Returns: scalar, float32 (float64 if any level is).
    Raises: ValueError if shapes, dtypes, devices or eps are wrong; TypeError if a level is not a floating-point
        tensor or eps not a number; RuntimeError on double backward of the compiled kernel.
    Source: LGD (Zhang et al., AAAI 2022), section on distillation: InstanceNorm without affine, then MSE.
    """
    _check(student, teacher, eps)
    if not _DISPATCH.compiled(student[0]):
        return instance_norm_mse_reference(student, teacher, eps)
    if student[0].dtype != teacher[0].dtype:
        dtype = torch.promote_types(student[0].dtype, teacher[0].dtype)
        student, teacher = ([level.to(dtype) for level in levels] for levels in (student, teacher))
    return torch.ops.fastkd.instance_norm_mse(list(student), list(teacher), float(eps))[0]


def _check(student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float) -> None:
    op = "instance_norm_mse"
    check_levels(op, "student", student)
    check_levels(op, "teacher", teacher)
    shapes, others = ([list(level.shape) for level in levels] for levels in (student, teacher))
    if shapes != others:
        raise ValueError(f"{op}: teacher must be {shapes} as the student, got {others}; take the same levels")
    check_device(op, "teacher", teacher[0], "the student", student[0])
    check_kernel_dtype(op, "student", student[0])
    check_kernel_dtype(op, "teacher", teacher[0])
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}; 1e-5 is usual")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}; 1e-5 is usual")


def _forward_fake(student: list[Tensor], teacher: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if student[0].dtype == torch.float64 else torch.float32
    rows = sum(level.shape[0] * level.shape[1] for level in student if level.shape[2] * level.shape[3] > 0)
    return student[0].new_empty((), dtype=dtype), student[0].new_empty((_MOMENTS, rows), dtype=dtype)


def _backward_fake(grad, student, teacher, moments, for_student: bool, for_teacher: bool) -> list[Tensor]:
    gradients = [dense_like(level) for level in student] if for_student else []
    for level, other in zip(student, teacher):
        if for_teacher:
            gradients.append(dense_like(level) if other.stride() != level.stride() else torch.empty_like(other))
    return gradients


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, _ = inputs
    _, moments = output
    ctx.levels = len(student)
    ctx.mark_non_differentiable(moments)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*student, *teacher, moments)


def _backward(ctx, grad_loss: Tensor | None, grad_moments: None):
    none = [None] * ctx.levels
    for_student, for_teacher = (any(needs) for needs in ctx.needs_input_grad[:2])
    if grad_loss is None:
        return none, none, None
    *levels, moments = ctx.saved_tensors
    student, teacher = levels[: ctx.levels], levels[ctx.levels :]
    gradients = torch.ops.fastkd.instance_norm_mse_backward(
        grad_loss, student, teacher, moments, for_student, for_teacher
    )
    return (
        gradients[: ctx.levels] if for_student else none,
        gradients[-ctx.levels :] if for_teacher else none,
        None,
    )


if _DISPATCH.registered:
    register_with_backward(
        "instance_norm_mse",
        fake=_forward_fake,
        setup_context=_setup_context,
        backward=_backward,
        backward_fake=_backward_fake,
    )
