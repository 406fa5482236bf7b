"""Builds methods by name for the pyramids of a host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastkd.distillers import CWD, FGFI, ICD, LGD, PKD
from fastkd.distillers.decoder import Attention, position_embeddings
from fastkd.distillers.protocol import Distilled, Distiller
from fastkd.distillers.queries import Queries
from fastkd.integrations.pyramids import PyramidSpec
from fastkd.ops._support.coverage import full_precision
from fastkd.types import Batch, ClassPriors

HEADS = 8
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
    """

    num_classes: int
    two_stage: bool = False
    anchors: Sequence[Tensor] | None = None
    channels: int | None = None


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
        self.teacher_projections = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in level_channels)

    def forward(
        self,
        student: Sequence[Tensor],
        batch: Batch,
        teacher: Sequence[Tensor] | None = None,
        **options,
    ) -> Distilled:
        """As in ICD, with teacher L tensors [B, level_channels[l], H_l, W_l]."""
        return super().forward(student, batch, self.project(teacher or []), **options)

    def project(self, teacher: Sequence[Tensor]) -> list[Tensor]:
        """The teacher's levels at the width of the decoder; the projections receive gradients."""
        return [layer(level.detach()) for layer, level in zip(self.teacher_projections, teacher, strict=True)]

    def decode(self, queries: Queries, teacher: Sequence[Tensor], batch: Batch) -> Iterator[tuple[Tensor, Attention]]:
        """As in ICD, but the projected levels are not detached, so that the values train the projections."""
        levels = [level * self.teacher_scale for level in teacher]
        level_sizes = [(level.shape[2], level.shape[3]) for level in levels]
        positions = position_embeddings(batch.image_sizes.to(levels[0].device), batch.padded_size, level_sizes)
        with full_precision(queries.boxes):
            decoded = self.encoder(queries)
        for layer in self.decoder:
            decoded, attention = layer(decoded, levels, positions)
            yield decoded, attention


def method_channels(facts: HostFacts, widths: Sequence[int]) -> int:
    """Width of a method for a student with these widths, divisible by the number of attention heads."""
    if facts.channels is not None:
        return facts.channels
    width = widths[0] if len(set(widths)) == 1 else min(max(widths), MAX_CHANNELS)
    return -(-width // HEADS) * HEADS


def _icd(facts: HostFacts, spec: PyramidSpec, priors: ClassPriors) -> Distiller:
    channels, widths = method_channels(facts, spec.student_widths), spec.teacher_widths
    published: dict[str, Any] = {"weight": 8.0, "max_queries": 300}
    if facts.two_stage:
        published = {"weight": 3.0, "max_queries": 100}
    if len(set(widths)) == 1:
        return ICD(facts.num_classes, priors, channels, teacher_channels=widths[0], heads=HEADS, **published)
    return LevelwiseICD(facts.num_classes, priors, channels, level_channels=widths, heads=HEADS, **published)


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


METHODS: dict[str, tuple[Callable[[HostFacts, PyramidSpec, ClassPriors], Distiller], bool]] = {
    "icd": (_icd, True),
    "lgd": (_lgd, False),
    "fgfi": (_fgfi, True),
    "pkd": (_pkd, True),
    "cwd": (_cwd, True),
}
"""Builder of each method, and whether it needs a teacher."""


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
    return METHODS[method][1] if isinstance(method, str) else method.needs_teacher


def settings_of(method: Distiller) -> Settings:
    """The published training settings."""
    return Settings(method.detach_fraction, method.clip_norm)
