"""value_mimic: squared error of normalised values, weighted by the attention mass (ICD, methods 1.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops._support.checks import check_device, check_kernel_dtype, check_levels, check_same_sizes
from fastkd.ops._support.coverage import flatten_pyramid, full_precision
from fastkd.ops._support.dispatch import Dispatch
from fastkd.ops._support.registration import dense_like, register_with_backward

_DISPATCH = Dispatch("value_mimic")


def _head_norm(value: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine of [B, G, d, S] over d."""
    centred = value - value.mean(dim=2, keepdim=True)
    return centred * (centred.square().mean(dim=2, keepdim=True) + eps).rsqrt()


def value_mimic_reference(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mass: Sequence[Tensor], eps: float = 1e-5
) -> Tensor:
    """Plain torch of `value_mimic`."""
    with full_precision(student[0]):
        weight = flatten_pyramid([level.detach() for level in mass])  # [B, G, S]
        heads = weight.shape[1]
        values = _head_norm(flatten_pyramid(student).unflatten(1, (heads, -1)), eps)  # [B, G, d, S]
        targets = _head_norm(flatten_pyramid([level.detach() for level in teacher]).unflatten(1, (heads, -1)), eps)
        error = (values - targets).square().mean(dim=2)  # [B, G, S]
        return (weight * error).sum(dim=2) / weight.sum(dim=2).clamp(min=1e-6)


def value_mimic(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mass: Sequence[Tensor], eps: float = 1e-5
) -> Tensor:
    """Mass-weighted squared error between per-head normalised student and teacher values.

    v, t = LayerNorm without affine of student, teacher over each head's d channels;
    loss[b, g] = mean over the head's channels of sum_s M (v - t)^2 / max(sum_s M, 1e-6), s over all levels' cells.

    Args:
        student: L tensors [B, G * d, H_l, W_l], floating point; receive gradients.
        teacher: L tensors of the same shapes; no gradient. Where its dtype differs, the narrower one is widened.
        mass: L tensors [B, G, H_l, W_l]; no gradient.
        eps: added to the variance, >= 0.
    Returns: [B, G], float32 (float64 if any argument is).
    Raises: ValueError or TypeError if shapes, dtypes or devices disagree; RuntimeError on double backward of the
        compiled kernel.
    Source: ICD (Kang et al., NeurIPS 2021), section 3.3.
    """
    _check(student, teacher, mass, eps)
    if not _DISPATCH.compiled(student[0]):
        return value_mimic_reference(student, teacher, mass, eps)
    dtype = student[0].dtype
    if teacher[0].dtype != dtype:  # checked first, as promote_types dispatches an operator
        dtype = torch.promote_types(dtype, teacher[0].dtype)
    if torch.float64 in (dtype, mass[0].dtype):
        dtype = torch.float64
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.ops.fastkd.value_mimic(
        [level.to(dtype) for level in student],
        [level.detach().to(dtype) for level in teacher],
        [level.detach().to(sums) for level in mass],
        float(eps),
    )[0]


def _check(student: Sequence[Tensor], teacher: Sequence[Tensor], mass: Sequence[Tensor], eps: float) -> None:
    op = "value_mimic"
    for name, levels in (("student", student), ("teacher", teacher), ("mass", mass)):
        check_levels(op, name, levels)
        check_kernel_dtype(op, name, levels[0])
    for name, levels in (("teacher", teacher), ("mass", mass)):
        check_same_sizes(op, name, levels, "student", student)
        check_device(op, name, levels[0], "student", student[0])
    channels, heads = student[0].shape[1], mass[0].shape[1]
    if teacher[0].shape[1] != channels:
        raise ValueError(
            f"{op}: teacher must have the student's {channels} channels, got {teacher[0].shape[1]}; "
            "project both to the same width"
        )
    if channels < 1 or heads < 1 or channels % heads:
        raise ValueError(
            f"{op}: mass must have a number of heads that divides {channels} channels, got {heads}; "
            "pass the mass of the attention the values belong to"
        )
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}; 1e-5 is usual")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}; 1e-5 is usual")


def _forward_fake(student, teacher, mass, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if student[0].dtype == torch.float64 else torch.float32
    shape = mass[0].shape[:2]
    return student[0].new_empty(shape, dtype=dtype), student[0].new_empty(shape, dtype=dtype)


def _backward_fake(grad, student, teacher, mass, total, eps: float) -> list[Tensor]:
    return [dense_like(level) for level in student]


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, mass, ctx.eps = inputs
    ctx.levels = len(student)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*student, *teacher, *mass, output[1])


def _backward(ctx, grad: Tensor | None, grad_total: None):
    none = [None] * ctx.levels
    if grad is None or not any(ctx.needs_input_grad[0]):
        return none, none, none, None
    *saved, total = ctx.saved_tensors
    student, teacher, mass = (list(saved[start * ctx.levels : (start + 1) * ctx.levels]) for start in range(3))
    return torch.ops.fastkd.value_mimic_backward(grad, student, teacher, mass, total, ctx.eps), none, none, None


if _DISPATCH.registered:
    register_with_backward(
        "value_mimic",
        fake=_forward_fake,
        setup_context=_setup_context,
        backward=_backward,
        backward_fake=_backward_fake,
    )
