"""instance_norm_mse: mean squared error between the instance-normalised levels of two pyramids (LGD's distillation loss)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops import _library

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MOMENTS = 8  # numbers the forward kernel keeps for each row


def _normalise(level: Tensor, eps: float) -> Tensor:
    if level.dtype in (torch.bfloat16, torch.float16):
        level = level.float()
    centred = level - level.mean((2, 3), keepdim=True)
    return centred * (centred.square().mean((2, 3), keepdim=True) + eps).rsqrt()


def instance_norm_mse_reference(
    student_levels: Sequence[Tensor], teacher_levels: Sequence[Tensor], eps: float = 1e-5
) -> Tensor:
    """The specification of `instance_norm_mse`, in plain torch, without checks."""
    total, count = 0.0, 0
    for student, teacher in zip(student_levels, teacher_levels):
        total = total + (_normalise(student, eps) - _normalise(teacher, eps)).square().sum()
        count += student.numel()
    return total / max(count, 1)


def instance_norm_mse(student_levels: Sequence[Tensor], teacher_levels: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """Mean squared error between two pyramids, every channel of every image and level normalised first.

    loss = mean over all elements of all levels of (IN(student) - IN(teacher))^2, IN(x) = (x - mean) / sqrt(var + eps) over the
    cells of a channel, var without Bessel's correction; so a level of one cell is 0. No elements at all give 0.

    Args:
        student_levels: L tensors [B, C, H_l, W_l] of one floating dtype, on one device; receive gradients.
        teacher_levels: the same shapes, dtype and device; receive gradients (detach them to distil). Under autocast student
            and teacher may differ in dtype: the narrower is widened.
        eps: added to the variance, >= 0.
    Returns: scalar; float32 for half types (they accumulate in float32), else the dtype of the levels.
    Raises: ValueError if shapes, dtypes, devices or eps disagree with this; TypeError if a level is no tensor; RuntimeError on
        double backward of the compiled kernel.
    Source: LGD (Zhang et al., AAAI 2022), section on distillation: InstanceNorm without affine, then MSE.
    """
    student_levels, teacher_levels = list(student_levels), list(teacher_levels)
    _check(student_levels, teacher_levels, eps)
    if student_levels[0].device.type == "cpu" and _library.has_kernel("instance_norm_mse"):
        return torch.ops.fastkd.instance_norm_mse(student_levels, teacher_levels, eps)[0]
    return instance_norm_mse_reference(student_levels, teacher_levels, eps)


def _check(student_levels: list[Tensor], teacher_levels: list[Tensor], eps: float) -> None:
    if not student_levels or len(student_levels) != len(teacher_levels):
        raise ValueError(
            "instance_norm_mse: student_levels and teacher_levels must have the same number of levels, at least one, got "
            f"{len(student_levels)} and {len(teacher_levels)}; pass the pyramids of the same levels"
        )
    if not eps >= 0:
        raise ValueError(f"instance_norm_mse: eps must be >= 0, got {eps}; 1e-5 is usual")
    for name, levels in (("student_levels", student_levels), ("teacher_levels", teacher_levels)):
        for level in levels:
            if not isinstance(level, Tensor):
                raise TypeError(f"instance_norm_mse: {name} must be tensors, got {type(level).__name__}; pass a list of L tensors")
            if level.dim() != 4:
                raise ValueError(
                    f"instance_norm_mse: {name} must be [B, C, H, W], got {list(level.shape)}; add the missing dimensions"
                )
            if level.dtype not in _FLOATS or level.dtype != levels[0].dtype:
                raise ValueError(
                    f"instance_norm_mse: {name} must be of one dtype, float32, float64, bfloat16 or float16, got {level.dtype} "
                    f"beside {levels[0].dtype}; convert them with .to(dtype)"
                )
            if level.device != student_levels[0].device:
                raise ValueError(
                    f"instance_norm_mse: {name} must be on {student_levels[0].device} like the first student level, got "
                    f"{level.device}; move them with .to(device)"
                )
    for index, (student, teacher) in enumerate(zip(student_levels, teacher_levels)):
        if student.shape != teacher.shape:
            raise ValueError(
                f"instance_norm_mse: teacher_levels[{index}] must be {list(student.shape)} like the student's, got "
                f"{list(teacher.shape)}; adapt the channels or choose the same strides"
            )
    student, teacher = student_levels[0], teacher_levels[0]
    if student.dtype != teacher.dtype and not torch.is_autocast_enabled(student.device.type):
        raise ValueError(
            f"instance_norm_mse: teacher_levels must be {student.dtype} like the student's, got {teacher.dtype}; convert one of "
            "them with .to(dtype), or use autocast"
        )


def _dense_like(level: Tensor) -> Tensor:
    """A new tensor with the kernel's memory order for a gradient: channels-last where the level is, else contiguous."""
    channels_last = not level.is_contiguous() and level.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(
        level.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    )


def _forward_fake(student: list[Tensor], teacher: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if student[0].dtype == torch.float64 else torch.float32
    rows = sum(level.shape[0] * level.shape[1] for level in student if level.shape[2] * level.shape[3] > 0)
    return student[0].new_empty((), dtype=dtype), student[0].new_empty((_MOMENTS, rows), dtype=dtype)


def _backward_fake(grad, student, teacher, moments, for_student: bool, for_teacher: bool) -> list[Tensor]:
    gradients = [_dense_like(level) for level in student] if for_student else []
    for level, other in zip(student, teacher):
        if for_teacher:
            gradients.append(_dense_like(level) if other.stride() != level.stride() else torch.empty_like(other))
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


def _double_backward(ctx, *grads):
    raise RuntimeError(
        "instance_norm_mse: double backward is not available in the compiled kernel; use "
        "fastkd.ops.instance_norm_mse.instance_norm_mse_reference, which is plain torch"
    )


def _autocast(student: list[Tensor], teacher: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Levels keep their dtype (half types accumulate in float32 anyway); only where two dtypes meet the narrower is widened."""
    dtype = torch.promote_types(student[0].dtype, teacher[0].dtype)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return torch.ops.fastkd.instance_norm_mse(
            [level.to(dtype) for level in student], [level.to(dtype) for level in teacher], eps
        )


if _library.has_kernel("instance_norm_mse"):
    torch.library.register_fake("fastkd::instance_norm_mse", _forward_fake)
    torch.library.register_fake("fastkd::instance_norm_mse_backward", _backward_fake)
    torch.library.register_autograd("fastkd::instance_norm_mse", _backward, setup_context=_setup_context)
    torch.library.register_autograd("fastkd::instance_norm_mse_backward", _double_backward)
    torch.library.impl("fastkd::instance_norm_mse", "AutocastCPU", _autocast)
