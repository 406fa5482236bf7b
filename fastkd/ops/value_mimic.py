"""value_mimic: squared error of normalised values, weighted by the attention mass (ICD, methods 1.4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkd.ops.checks import check_levels, check_same_sizes
from fastkd.ops.coverage import full_precision
from fastkd.ops.instance_attention import flatten_pyramid


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
        teacher: L tensors of the same shapes; no gradient.
        mass: L tensors [B, G, H_l, W_l]; no gradient.
        eps: added to the variance.
    Returns: [B, G], float32 (float64 of float64).
    Raises: ValueError or TypeError if shapes or dtypes disagree.
    Source: ICD (Kang et al., NeurIPS 2021), section 3.3.
    """
    for name, levels in (("student", student), ("teacher", teacher), ("mass", mass)):
        check_levels("value_mimic", name, levels)
    check_same_sizes("value_mimic", "teacher", teacher, "student", student)
    check_same_sizes("value_mimic", "mass", mass, "student", student)
    channels, heads = student[0].shape[1], mass[0].shape[1]
    if teacher[0].shape[1] != channels:
        raise ValueError(
            f"value_mimic: teacher must have the student's {channels} channels, got {teacher[0].shape[1]}; "
            "project both to the same width"
        )
    if heads < 1 or channels % heads:
        raise ValueError(
            f"value_mimic: mass must have a number of heads that divides {channels} channels, got {heads}; "
            "pass the mass of the attention the values belong to"
        )
    return value_mimic_reference(student, teacher, mass, eps)
