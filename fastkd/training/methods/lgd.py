"""LGD in a run: settings, phases, recipes, the doctor's advice, what the report shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastkd.codec import require, require_fraction
from fastkd.detectors import DetectorConfig
from fastkd.distillers import LGD
from fastkd.training.doctor.finding import Finding
from fastkd.training.methods.phase import Phase, steps_of
from fastkd.training.methods.protocol import FeatureMethod, Given, Method, Setup
from fastkd.training.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    from fastkd.report.insides import View
    from fastkd.training.config import Recipe

SCENES_OPTIMIZER = OptimizerConfig(kind="adamw", learning_rate=1e-3, weight_decay=0.05, decay="cosine", warmup=0.05)


@dataclass(frozen=True)
class LGDConfig(FeatureMethod):
    """Label-guided self-distillation: no teacher; the labels make the instructive features.

    Args:
        heads: attention heads of the relation adapter.
        context: add the whole image as an object without class.
        detach_appearance: keep the gradient of the appearance encoder from the student (two-stage detectors).
        use_masks: pool and paint with instance masks instead of boxes, and describe them to the label encoder.
        adapter_query: which embeddings ask and which answer in the relation adapter.
        instructive_weight: of the detector's loss on the instructive pyramid.
        detach_fraction: first part of the run in which the distillation loss does not reach the student.
        freeze_fraction: first part in which the backbone below the FPN gets no update; only if it is pretrained.
        weight: of the distillation loss.
        final_fraction: last part of the run without distillation.
    """

    kind = "lgd"
    label = "LGD"
    compared_with = "fgfi"

    heads: int = 8
    context: bool = True
    detach_appearance: bool = False
    use_masks: bool = False
    adapter_query: Literal["appearance", "label", "appearance_only", "label_only"] = "appearance"
    instructive_weight: float = 1.0
    detach_fraction: float = 30 / 180
    freeze_fraction: float = 20 / 180

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.heads >= 1, "LGDConfig: heads", "at least 1", self.heads)
        require(self.instructive_weight >= 0, "LGDConfig: instructive_weight", "0 or more", self.instructive_weight)
        require_fraction(self, "detach_fraction", "freeze_fraction")

    def build(self, given: Given) -> LGD:
        return LGD(
            given.student.num_classes,
            given.student.channels,
            heads=self.heads,
            context=self.context,
            detach_appearance=self.detach_appearance,
            use_masks=self.use_masks,
            adapter_query=self.adapter_query,
            weight=self.weight,
            instructive_weight=self.instructive_weight,
            recompute=given.recompute,
        )

    def phase(self, step: int, steps: int, *, pretrained: bool) -> Phase:
        distill = super().phase(step, steps, pretrained=pretrained).distill
        detach = distill and step < steps_of(self.detach_fraction, steps)
        frozen = pretrained and step < steps_of(self.freeze_fraction, steps)
        return Phase(distill=distill, detach_student=detach, train_backbone=not frozen)

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if self.use_masks and not recipe.with_masks:
            name = recipe.detector.detector
            raise ValueError(f"Recipe: method.use_masks must be False for {name}, got True; it loads no masks")

    def advice(self, recipe: Recipe) -> Iterator[Finding]:
        yield from Method.advice(self, recipe)  # with weight 0 the labels still train the head
        two_stage, found = recipe.detector.two_stage, []
        if two_stage != self.detach_appearance:
            wanted = "on for two-stage detectors, off for dense ones"
            found.append(f"LGD's detach_appearance is published {wanted}, got {self.detach_appearance}")
        if two_stage and self.context:
            found.append("LGD's context object is published off for two-stage detectors, it is on")
        if recipe.with_masks and not self.use_masks:
            found.append("LGD on mask_rcnn is published with masks; pass --method.use-masks")
        for text in found:
            yield Finding("warning", "switches", text)

    @classmethod
    def published(cls, detector: DetectorConfig) -> Setup:
        """Methods 2.5. FCOS with R50 is published without a context object; two-stage detectors have none either."""
        without_context = detector.detector == "fcos" and detector.backbone == "resnet50"
        method = cls(
            context=not detector.two_stage and not without_context,
            detach_appearance=detector.two_stage,
            use_masks=detector.with_masks,
            final_fraction=50 / 180 if detector.deformable else 0.0,
        )
        return Setup(method, schedule="2x")

    @classmethod
    def on_scenes(cls, detector: DetectorConfig) -> Setup:
        """The published hyper-parameters, but for these.

        instructive_weight: the head's two losses share a step of AdamW, so at 1 the student's falls behind; LGD's own
        modules have their own optimiser, which does not mind the factor.
        weight, and an end after two fifths of the run: so short a run's instructive pyramid is better than the
        student's own up to about step 220 of 600 and by little; imitating it later, or at full weight, costs AP
        (docs/results/findings.md).
        freeze_fraction 0: AdamW's first update moves every weight by the whole rate, and behind the warm-up that is
        enough to ruin a pretrained backbone (classification loss 0.68 -> 0.77 at the thaw, 0.48 in the plain student).
        A slower optimiser of its own: with AdamW at the student's 2e-3 the spread of the label embeddings over the
        objects of a batch fell from 0.36 of their length to 0.05 within 40 steps and 0.003 after 1000, and shuffled
        labels changed nothing.
        """
        method = cls.published(detector).method
        assert isinstance(method, cls)
        method = dataclasses.replace(
            method, weight=0.25, instructive_weight=0.1, freeze_fraction=0.0, final_fraction=0.6
        )
        return Setup(method, SCENES_OPTIMIZER)

    @classmethod
    def view(cls) -> View:
        from fastkd.report.insides import features_view

        return features_view("What the labels teach (LGD)")
