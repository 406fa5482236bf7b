"""ICD in a run: settings, phases, recipes, the doctor's advice, what the report shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd.codec import require, require_fraction
from fastkd.detectors import DetectorConfig
from fastkd.distillers import ICD
from fastkd.training.doctor.finding import Finding
from fastkd.training.methods.figures import Figures, Log, inside_findings
from fastkd.training.methods.phase import Phase, steps_of
from fastkd.training.methods.protocol import FeatureMethod, Given, Setup
from fastkd.training.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    from fastkd.report.insides import View
    from fastkd.training.config import Recipe

UNIT_SIZE = (0.2, 3.0)  # accepted standard deviations of the scaled teacher pyramid at the decoder's input


def _optimizer(rate: float = 1e-4, warmup: float = 0.0) -> OptimizerConfig:
    return OptimizerConfig(
        kind="adamw",
        learning_rate=rate,
        weight_decay=1e-4,
        decay="cosine",
        warmup=warmup,
        clip_norm=0.01,
        decay_norm_and_bias=True,
    )


@dataclass(frozen=True)
class ICDConfig(FeatureMethod):
    """Instance-conditional distillation: a decoder's attention over the teacher weights the loss for each instance.

    Args:
        heads: attention heads of the decoder.
        layers: decoder layers.
        rho: fake queries per real query.
        max_queries: maximum number of queries per image (more only if it has more boxes).
        temperature: temperature of the attention that weights the distillation loss.
        teacher_scale: factor on the teacher's pyramid in the decoder, to bring it to a standard deviation near 1.
        detach_fraction: first fraction of the run, in which the distillation loss does not reach the student.
        weight: weight of the distillation loss; published are 8 for dense and 3 for two-stage detectors.
        final_fraction: last fraction of the run, without distillation.
    """

    kind = "icd"
    label = "ICD"
    pays = (
        "pays where a good teacher is at hand, for a student that inherits its neck and head and for one that does not."
    )
    needs_teacher = True
    needs_priors = True

    heads: int = 8
    layers: int = 1
    rho: int = 5
    max_queries: int = 300
    temperature: float = 1.0
    teacher_scale: float = 1.0
    detach_fraction: float = 1 / 90
    weight: float = dataclasses.field(default=8.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "layers", "max_queries"):
            require(getattr(self, name) >= 1, f"ICDConfig: {name}", "at least 1", getattr(self, name))
        require(self.rho >= 0, "ICDConfig: rho", "0 or more", self.rho)
        require(self.temperature > 0, "ICDConfig: temperature", "positive", self.temperature)
        require(self.teacher_scale > 0, "ICDConfig: teacher_scale", "positive", self.teacher_scale)
        require_fraction(self, "detach_fraction")

    def build(self, given: Given) -> ICD:
        return ICD(
            given.student.num_classes,
            given.priors,
            given.student.channels,
            teacher_channels=given.teacher.channels,
            heads=self.heads,
            layers=self.layers,
            rho=self.rho,
            max_queries=self.max_queries,
            weight=self.weight,
            temperature=self.temperature,
            teacher_scale=self.teacher_scale,
        )

    def phase(self, step: int, steps: int, *, pretrained: bool) -> Phase:
        distill = super().phase(step, steps, pretrained=pretrained).distill
        return Phase(distill=distill, detach_student=distill and step < steps_of(self.detach_fraction, steps))

    def advice(self, recipe: Recipe) -> Iterator[Finding]:
        yield from super().advice(recipe)
        if not recipe.inherit:
            yield Finding("warning", "switches", "ICD is published with inheriting, which is off; pass --inherit")
        if recipe.method_optimizer is None:
            text = "ICD's decoder shares the student's optimiser; published is an AdamW of its own"
            yield Finding("warning", "switches", text)

    def pyramid_advice(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Iterator[Finding]:
        if student[0].shape[1] != teacher[0].shape[1]:
            text = "with other channels than the student's ICD's projections do not start as the teacher's"
            yield Finding("warning", "adapter", text)
        size = float(torch.cat([level.flatten() for level in teacher]).float().std()) * self.teacher_scale
        good = UNIT_SIZE[0] <= size <= UNIT_SIZE[1]
        advice = "" if good else f"; set --method.teacher-scale {self.teacher_scale / max(size, 1e-6):.2g}"
        text = f"ICD sees a teacher of standard deviation {size:.2g}{advice}"
        yield Finding("ok" if good else "warning", "scale", text)

    def teaching_advice(self, log: Log) -> Iterator[Finding]:
        yield from super().teaching_advice(log)
        remedy = "the decoder has not learned to find the instances; train longer, raise its learning rate, or check "
        remedy += "--method.teacher-scale"
        yield from inside_findings(Figures.read(log), "weights of ICD's attention", remedy)

    @classmethod
    def published(cls, detector: DetectorConfig) -> Setup:
        """The published hyper-parameters, methods.md 1.4 and 1.5."""
        method = cls(max_queries=100, weight=3.0) if detector.two_stage else cls()
        return Setup(method, _optimizer(), inherit=True)

    @classmethod
    def on_scenes(cls, detector: DetectorConfig) -> Setup:
        """The published hyper-parameters, except:

        teacher_scale: the pyramids of the scenes teachers have a standard deviation of 3 to 6, as their heads have
            normalisation layers.
        heads: 2, so that a head has 32 channels, as published, in a pyramid of 64 channels.
        """
        method = cls.published(detector).method
        assert isinstance(method, cls)
        method = dataclasses.replace(method, heads=2, teacher_scale=0.2)
        return Setup(method, _optimizer(3e-4, warmup=0.05), inherit=True)

    @classmethod
    def view(cls) -> View:
        from fastkd.report.insides import attention_view

        return attention_view("Where the teacher looks (ICD)")
