"""Checks that methods with a teacher share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkd.ops._support.checks import check_levels, check_same_sizes


def check_pyramids(
    name: str, student: Sequence[Tensor], teacher: Sequence[Tensor] | None, channels: int, teacher_channels: int
) -> Sequence[Tensor]:
    """The teacher's pyramid, if both pyramids fit the method and each other.

    Args:
        name: of the method, for messages.
        student: L tensors [B, channels, H_l, W_l].
        teacher: L tensors [B, teacher_channels, H_l, W_l], or None.
    Raises: ValueError or TypeError if the teacher is missing or the pyramids disagree.
    """
    if teacher is None:
        raise ValueError(f"{name}: teacher must be given, got None; pass the frozen teacher's pyramid")
    check_levels(name, "student", student, channels=channels)
    check_levels(name, "teacher", teacher, channels=teacher_channels)
    check_same_sizes(name, "teacher", teacher, "student", student)
    return teacher
