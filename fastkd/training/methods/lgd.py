"""LGD in a run: settings, phases, recipes, the doctor's advice, what the report shows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastkd.codec import require, require_fraction
from fastkd.detectors import DetectorConfig
from fastkd.distillers import LGD
from fastkd.training.doctor.finding import Finding
from fastkd.training.doctor.median_box import MedianBox
from fastkd.training.methods.figures import Figures, Log
from fastkd.training.methods.phase import Phase, steps_of
from fastkd.training.methods.protocol import FeatureMethod, Given, Method, Setup
from fastkd.training.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    from fastkd.report.insides import View
    from fastkd.training.config import Recipe

# A median box of fewer cells, 5 x 5, says little about the edges of the object. On the Scenes it covers 21 of P3,
# and the instructive pyramid did not stay better than the student's (docs/results/findings.md).
FEW_CELLS = 25
LEAST_GAP = 0.02  # relative to the student's loss
SCENES_OPTIMIZER = OptimizerConfig(kind="adamw", learning_rate=1e-3, weight_decay=0.05, decay="cosine", warmup=0.05)


@dataclass(frozen=True)
class LGDConfig(FeatureMethod):
    """Label-guided self-distillation: no teacher; instructive features are computed from labels and student features.

    Args:
        heads: attention heads of the relation adapter.
        context: add the whole image as an object without a class.
        detach_appearance: stop the gradient from the appearance encoder to the student (two-stage detectors).
        use_masks: pool and paint with instance masks instead of boxes, and encode the masks in the label encoder.
        adapter_query: the embeddings used as queries in the relation adapter, see `RelationAdapter`.
        instructive_weight: weight of the detector's loss on the instructive pyramid.
        detach_fraction: first fraction of the run, in which the distillation loss does not reach the student.
        freeze_fraction: first fraction of the run, in which a pretrained backbone below the FPN is not updated.
        weight: weight of the distillation loss.
        final_fraction: last fraction of the run, without distillation.
    """

    kind = "lgd"
    label = "LGD"
    compared_with = "fgfi"
    pays = (
        "needs no teacher; in runs as short as these it has gained nothing, as its instructive features were hardly "
        "better than the student's own."
    )

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

    @property
    def needs_masks(self) -> bool:
        return self.use_masks

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
        yield from Method.advice(self, recipe)  # no warning for weight 0: the instructive loss still trains the head
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

    def box_advice(self, median: MedianBox) -> Iterator[Finding]:
        text = f"the median box, {median.width:.0f} x {median.height:.0f} pixels, covers {median.cells:.0f} cells of "
        text += f"{median.level}"
        if median.cells >= FEW_CELLS:
            yield Finding("ok", "boxes", text)
        else:
            advice = "LGD paints boxes into cells, and few cells teach little; raise --data.short-sides, "
            advice += "--data.val-short-side and --data.max-side, or --detector.anchor-base"
            yield Finding("warning", "boxes", f"{text}: {advice}")

    def teaching_advice(self, log: Log) -> Iterator[Finding]:
        figures = Figures.read(log)
        gap, losses = figures.now("gap"), {name: figures.now(name) for name in figures.series}
        if gap is not None:
            taught = math.fsum(value or 0.0 for name, value in losses.items() if name.startswith("instructive_loss_"))
            parts = {name.removeprefix("gap_"): value for name, value in losses.items() if name.startswith("gap_")}
            listed = ", ".join(f"{name} {value:+.3g}" for name, value in parts.items())
            text = f"the student's loss is {taught + gap:.3g}, the instructive pyramid's {taught:.3g} (gap: {listed})"
            yield self._judged(gap > LEAST_GAP * (taught + gap), text)
        student = dict(figures.series.get("AP", ()))
        for step, instructive in [one for one in figures.series.get("instructive_AP", ()) if one[0] in student][-1:]:
            text = f"instructive AP {instructive:.1f}, given the labels, against the student's {student[step]:.1f} "
            yield self._judged(instructive > student[step], text + f"at step {step}")

    @staticmethod
    def _judged(teaches: bool, text: str) -> Finding:
        if teaches:
            return Finding("ok", "teaching", text)
        advice = "it is no better than the student, which loses by imitating it; train longer, begin imitation later "
        advice += "(--method.detach-fraction), end it earlier (--method.final-fraction), or use larger images"
        return Finding("warning", "teaching", f"{text}: {advice}")

    @classmethod
    def published(cls, detector: DetectorConfig) -> Setup:
        """The published hyper-parameters, methods.md 2.5: no context object in FCOS R50 and two-stage detectors."""
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
        """The published hyper-parameters, except:

        instructive_weight: AdamW normalises the sum of the head's two losses, so with weight 1 the loss on the
            student's pyramid decreases more slowly. LGD's modules have a separate AdamW, on which a constant factor
            has no effect.
        weight and final_fraction: in such a short run the instructive pyramid is only slightly better than the
            student's, and only up to about step 220 of 600; a longer distillation or full weight costs AP
            (docs/results/findings.md).
        freeze_fraction 0: AdamW's first update changes every weight by the full learning rate. If it comes after the
            warm-up it damages a pretrained backbone: the classification loss rose from 0.68 to 0.77 when the backbone
            was unfrozen, against 0.48 in the plain student.
        optimizer: a separate AdamW with a lower rate. With the student's rate of 2e-3 the label embeddings collapsed
            (spread over the objects of a batch, relative to their norm: 0.36 at first, 0.05 after 40 steps, 0.003
            after 1000), and shuffled labels made no difference.
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
