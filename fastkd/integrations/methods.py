"""Builds methods by name for the pyramids of a host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastkd.distillers import CWD, FGFI, ICD, LGD, PKD, ScoreL2
from fastkd.distillers.protocol import Distiller
from fastkd.integrations.pyramids import PyramidSpec
from fastkd.types import ClassPriors

HEADS = 8  # of LGD; divides every method's width
HEAD_CHANNELS = 32  # of ICD: 256 channels in 8 heads are published
MAX_CHANNELS = 256


@dataclass(frozen=True)
class HostFacts:
    """Properties of a host, besides its pyramids, that determine a method's settings.

    Args:
        num_classes: object classes, without background.
        two_stage: the host has a region proposal network (selects the published weights).
        anchors: L tensors [A, 4] xyxy of the cell at the origin, for FGFI; None if the host has no anchors.
        channels: width of the method; None takes the student's if all levels have the same, else its largest, at most
            256.
        teacher_scale: factor on the teacher's pyramid in ICD's attention.
    """

    num_classes: int
    two_stage: bool = False
    anchors: Sequence[Tensor] | None = None
    channels: int | None = None
    teacher_scale: float = 1.0


@dataclass(frozen=True)
class Settings:
    """Training settings of a method in a host.

    Args:
        detach_fraction: first fraction of the run, in which the distillation loss does not reach the student.
        clip: maximum gradient norm of the method's modules.
    """

    detach_fraction: float = 1 / 90
    clip: float = 1.0


class LevelwiseICD(ICD):
    """ICD for a teacher with levels of different widths: adds a trained 1x1 projection of each level to `channels`.

    The projections are trained by the auxiliary task, through the attention's values; the teacher is frozen.

    Args:
        num_classes, priors, channels: as in ICD.
        level_channels: channels of the teacher's levels.
        **settings: as in ICD.
    """

    def __init__(
        self, num_classes: int, priors: ClassPriors, channels: int, *, level_channels: Sequence[int], **settings
    ):
        super().__init__(num_classes, priors, channels, **settings)
        self.level_channels = list(level_channels)
        self.teacher_projections = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in level_channels)

    def teacher_levels(self, teacher: Sequence[Tensor] | None) -> list[Tensor]:
        """The teacher's levels, each projected to `channels`, times `teacher_scale`; gradients reach the projections.

        Args:
            teacher: L tensors [B, level_channels[l], H_l, W_l].
        """
        widths = [level.shape[1] for level in teacher or []]
        if widths != self.level_channels:
            raise ValueError(
                f"ICD: teacher must have levels of {self.level_channels} channels, got {widths}; pass the frozen "
                "teacher's pyramid"
            )
        levels = zip(self.teacher_projections, teacher or [], strict=True)
        return [layer(level.detach()) * self.teacher_scale for layer, level in levels]


def method_channels(facts: HostFacts, widths: Sequence[int]) -> int:
    """Width of a method for a student with these widths, divisible by the number of attention heads."""
    if facts.channels is not None:
        return facts.channels
    width = widths[0] if len(set(widths)) == 1 else min(max(widths), MAX_CHANNELS)
    return -(-width // HEADS) * HEADS


def icd_heads(channels: int) -> int:
    """Attention heads of about HEAD_CHANNELS channels that divide `channels`."""
    return next(heads for heads in range(max(1, channels // HEAD_CHANNELS), 0, -1) if channels % heads == 0)


def _icd(facts: HostFacts, spec: PyramidSpec, priors: ClassPriors) -> Distiller:
    channels, widths = method_channels(facts, spec.student_widths), spec.teacher_widths
    options: dict[str, Any] = {"weight": 8.0, "max_queries": 300}  # published
    if facts.two_stage:
        options = {"weight": 3.0, "max_queries": 100}
    options |= {"heads": icd_heads(channels), "teacher_scale": facts.teacher_scale}
    if len(set(widths)) == 1:
        return ICD(facts.num_classes, priors, channels, teacher_channels=widths[0], **options)
    return LevelwiseICD(facts.num_classes, priors, channels, level_channels=widths, **options)


def _lgd(facts: HostFacts, spec: PyramidSpec, priors: ClassPriors) -> Distiller:
    channels = method_channels(facts, spec.student_widths)
    return LGD(facts.num_classes, channels, heads=HEADS, context=not facts.two_stage, detach_appearance=facts.two_stage)


def _fgfi(facts: HostFacts, spec: PyramidSpec, priors: ClassPriors) -> Distiller:
    if facts.anchors is None:
        raise ValueError("Distillation: method 'fgfi' needs a host with anchors, got one without; use 'icd' or 'lgd'")
    anchors = [facts.anchors[level] for level, _ in spec.pairs]
    channels = method_channels(facts, spec.student_widths)
    return FGFI(anchors, channels, teacher_channels=max(spec.teacher_widths))


def _pkd(facts: HostFacts, spec: PyramidSpec, priors: ClassPriors) -> Distiller:
    return PKD(method_channels(facts, spec.student_widths), teacher_channels=max(spec.teacher_widths))


def _cwd(facts: HostFacts, spec: PyramidSpec, priors: ClassPriors) -> Distiller:
    return CWD(method_channels(facts, spec.student_widths), teacher_channels=max(spec.teacher_widths))


def _score_l2(facts: HostFacts, spec: PyramidSpec, priors: ClassPriors) -> Distiller:
    channels = method_channels(facts, spec.student_widths)
    return ScoreL2(channels, teacher_channels=max(spec.teacher_widths), levels=len(spec.pairs))


METHODS: dict[str, tuple[Callable[[HostFacts, PyramidSpec, ClassPriors], Distiller], type[Distiller]]] = {
    "icd": (_icd, ICD),
    "lgd": (_lgd, LGD),
    "fgfi": (_fgfi, FGFI),
    "pkd": (_pkd, PKD),
    "cwd": (_cwd, CWD),
    "scorel2": (_score_l2, ScoreL2),
}
"""Builder and class of each method."""


def check_method(method: str | Distiller) -> None:
    """Raises ValueError or TypeError unless `method` is a name or a distiller."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"Distillation: method must be one of {sorted(METHODS)} or a Distiller, got {method!r}")
    elif not isinstance(method, Distiller):
        raise TypeError(
            f"Distillation: method must be a name or a Distiller, got {type(method).__name__}; "
            "pass for instance 'icd' or fastkd.distillers.LGD(num_classes, channels)"
        )


def needs_teacher(method: str | Distiller) -> bool:
    """Whether the method needs the teacher's pyramid."""
    return kind_of(method).needs_teacher


def needs_scores(method: str | Distiller) -> bool:
    """Whether the method needs the teacher's class scores."""
    return kind_of(method).needs_scores


def kind_of(method: str | Distiller) -> type[Distiller] | Distiller:
    """The class of a method by name, or the given object: both have the attributes of `Distiller`."""
    return METHODS[method][1] if isinstance(method, str) else method


def settings_of(method: Distiller) -> Settings:
    """The published training settings."""
    return Settings(method.detach_fraction, method.clip_norm)
