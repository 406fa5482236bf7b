"""Matches the levels of two pyramids by stride, and projects between their widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.ops._support.normalizer import is_distributed

LARGE = 3.0  # root mean square of a pyramid beyond which attention saturates
MAX_OCTAVES = 0.5  # levels are matched only if their strides differ by at most a factor of sqrt(2)


@dataclass(frozen=True)
class PyramidSpec:
    """Widths of both pyramids and the matched levels; determined in the first step, saved in the checkpoint.

    Args:
        student: channels of each level of the student.
        teacher: channels of each level of the teacher; empty without a teacher.
        pairs: (student's level, teacher's level), finest first; without a teacher (level, -1) for every level.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def student_widths(self) -> tuple[int, ...]:
        """Channels of the student's matched levels."""
        return tuple(self.student[level] for level, _ in self.pairs)

    @property
    def teacher_widths(self) -> tuple[int, ...]:
        """Channels of the teacher's matched levels."""
        return tuple(self.teacher[level] for _, level in self.pairs if level >= 0)


def check_pyramid(name: str, levels: object, images: int) -> list[Tensor]:
    """The levels as a list.

    Raises: TypeError or ValueError unless they are [images, C_l, H_l, W_l] tensors.
    """
    if not isinstance(levels, (list, tuple)) or not levels or not all(isinstance(level, Tensor) for level in levels):
        raise TypeError(
            f"Distillation: {name} must be a non-empty list of tensors [B, C, H_l, W_l], got {type(levels).__name__}; "
            "pass the outputs of the neck, finest level first"
        )
    for index, level in enumerate(levels):
        if level.dim() != 4 or level.shape[0] != images or 0 in level.shape:
            raise ValueError(
                f"Distillation: {name}[{index}] must be [{images}, C, H_l, W_l], got {list(level.shape)}; "
                "pass feature maps of the same images, flattened tokens reshaped to their grid"
            )
    return list(levels)


def _strides(levels: Sequence[Tensor], padded_size: tuple[int, int]) -> list[float]:
    """The stride of each level in pixels, the geometric mean over both axes."""
    return [math.sqrt(padded_size[0] / level.shape[2] * padded_size[1] / level.shape[3]) for level in levels]


def match_levels(
    student: Sequence[Tensor], teacher: Sequence[Tensor] | None, padded_size: tuple[int, int]
) -> PyramidSpec:
    """Pairs each level of the student with the level of the teacher that has the nearest stride.

    Levels without a match within a factor of sqrt(2) are left out.

    Raises: ValueError if no level has a match.
    """
    widths = tuple(level.shape[1] for level in student)
    if teacher is None:
        return PyramidSpec(widths, (), tuple((level, -1) for level in range(len(student))))
    mine, theirs = _strides(student, padded_size), _strides(teacher, padded_size)
    pairs = []
    for level, stride in enumerate(mine):
        distances = [abs(math.log2(stride / other)) for other in theirs]
        nearest = min(range(len(theirs)), key=distances.__getitem__)
        if distances[nearest] <= MAX_OCTAVES:
            pairs.append((level, nearest))
    if not pairs:
        raise ValueError(
            f"Distillation: the teacher's strides must be those of the student {[round(s) for s in mine]} for at least "
            f"one level, got {[round(s) for s in theirs]}; choose a teacher with the student's strides, or hand over "
            "other levels of it"
        )
    return PyramidSpec(widths, tuple(level.shape[1] for level in teacher), tuple(pairs))


def unit_scale(levels: Sequence[Tensor]) -> float:
    """The factor that brings the root mean square of all levels down to 1; 1 if it is at most LARGE.

    The features of a head that begins with a normalised convolution may have any size, and large ones saturate an
    attention; small ones only spread it and stay as they are. All processes of a distributed run get the same factor
    and must call this together.
    """
    squares = torch.stack([level.detach().float().square().sum() for level in levels]).sum()
    both = torch.stack([squares, squares.new_tensor(sum(level.numel() for level in levels))])
    if is_distributed():
        dist.all_reduce(both)
    size = math.sqrt(float(both[0] / both[1]))
    return 1 / size if LARGE < size < math.inf else 1.0


def resample(levels: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Resizes every level bilinearly to the height and width of the matching level."""
    return [
        level
        if level.shape[2:] == other.shape[2:]
        else F.interpolate(level, size=(other.shape[2], other.shape[3]), mode="bilinear", align_corners=False)
        for level, other in zip(levels, like, strict=True)
    ]


def widen(levels: Sequence[Tensor], channels: int) -> list[Tensor]:
    """Pads every level with zero channels to `channels`."""
    return [
        level if level.shape[1] == channels else F.pad(level, (0, 0, 0, 0, 0, channels - level.shape[1]))
        for level in levels
    ]


class Projections(nn.Module):
    """One 1x1 convolution for each level, or the identity if the widths agree.

    Args:
        inputs: channels of each level.
        outputs: channels of each level afterwards.
    """

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip(inputs, outputs, strict=True):
            layers.append(nn.Identity() if before == after else nn.Conv2d(before, after, 1))
        self.layers = nn.ModuleList(layers)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """L tensors [B, inputs[l], H_l, W_l] -> [B, outputs[l], H_l, W_l]."""
        return [layer(level) for layer, level in zip(self.layers, levels, strict=True)]
