"""The interface between trainer and distillation methods: settings, phases, optimisers, advice, recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from fastkd.codec import decode, require, require_fraction
from fastkd.detectors import Detector, DetectorConfig
from fastkd.training.doctor.finding import Finding
from fastkd.training.doctor.median_box import MedianBox
from fastkd.training.methods.figures import Figures, Log, imitation_findings, log_of_part, teacher_findings
from fastkd.training.methods.phase import Phase, steps_of
from fastkd.training.optimizer_config import OptimizerConfig
from fastkd.types import ClassPriors

if TYPE_CHECKING:
    from fastkd.report.insides import View
    from fastkd.training.config import Recipe


@dataclass(frozen=True)
class Setup:
    """Settings of the named recipes of a method.

    Args:
        method: settings of the method.
        optimizer: optimiser of the method's parameters; None uses the student's.
        inherit: initialise the student's neck and head from the teacher.
        schedule: schedule of the COCO recipes: "1x", "2x" or "3x".
    """

    method: Method
    optimizer: OptimizerConfig | None = None
    inherit: bool = False
    schedule: str = "1x"


@dataclass(frozen=True)
class Given:
    """Inputs of `Method.build`.

    Args:
        student: the detector to be trained.
        trained: the teacher, or None.
        measured: class priors of the training set, or None if the method does not need them.
        recompute: use activation checkpointing.
    """

    student: Detector
    trained: Detector | None = None
    measured: ClassPriors | None = None
    recompute: bool = False

    @property
    def teacher(self) -> Detector:
        """The teacher. Raises: ValueError if there is none."""
        if self.trained is None:
            raise ValueError("build: teacher must be given, got None; pass --teacher PATH/student.safetensors")
        return self.trained

    @property
    def priors(self) -> ClassPriors:
        """The class priors. Raises: ValueError if there are none."""
        if self.measured is None:
            raise ValueError("build: priors must be given, got None; measure them with fastkd.data.measure_priors")
        return self.measured


class Method:
    """Settings of a distillation method in a recipe. A subclass is a frozen dataclass whose fields have defaults.

    A subclass sets `kind` and `label` and implements `build`; all other methods have defaults. `FeatureMethod` below
    adds the weight and the final fraction that most methods have.

    Attributes:
        kind: identifier in recipe.json and in recipe names: lower case, without "-" if there are named recipes.
        label: name in tables and messages.
        needs_teacher: whether a recipe must name a trained teacher; equal to the distiller's attribute.
        needs_priors: whether `build` needs the class priors of the training set.
        compared_with: kind of the method whose extra cost the report compares this method's with; None for no
            comparison.
        pays: when the method pays, the rest of a sentence that begins with the label; "" if that has not been measured.
    """

    kind: ClassVar[str]
    label: ClassVar[str]
    needs_teacher: ClassVar[bool] = False
    needs_priors: ClassVar[bool] = False
    compared_with: ClassVar[str | None] = None
    pays: ClassVar[str] = ""

    @property
    def needs_masks(self) -> bool:
        """Whether the distiller needs the instance masks of the validation images, too, for its diagnostics."""
        return False

    def build(self, given: Given) -> nn.Module:
        """Builds the distiller with fresh weights from torch's global generator.

        Returns: a Distiller; for several methods an nn.ModuleDict of Distillers, with the names of `parts`.
        Raises: ValueError if student, teacher or priors do not fit the method.
        """
        raise NotImplementedError(f"{type(self).__name__}.build must be implemented")

    def distiller(self, student: Detector, teacher: Detector | None, priors: ClassPriors | None) -> nn.Module:
        """`build` with plain arguments instead of a `Given`."""
        return self.build(Given(student, teacher, priors))

    def parts(self) -> dict[str, Method]:
        """The combined methods by name; {"": self} for a single method."""
        return {"": self}

    def phase(self, step: int, steps: int, *, pretrained: bool) -> Phase:
        """The phase of step `step` (from 0) of `steps`.

        Args:
            pretrained: whether the student's backbone has pretrained weights.
        """
        return Phase()

    def optimizers(self, optimizer: OptimizerConfig | None) -> dict[str, tuple[str, OptimizerConfig | None]]:
        """The optimisers of the method's parameters: prefix of the parameter names -> (optimiser name, settings).

        Args:
            optimizer: the recipe's `method_optimizer`.
        """
        return {"": ("method", optimizer)}

    def scaled(self, factor: float) -> Method:
        """The settings for batches `factor` times as large: learning rates among them are multiplied by `factor`."""
        return self

    @classmethod
    def unfit(cls, detector: DetectorConfig) -> str | None:
        """Why the method does not support a detector; None if it does."""
        return None

    def check(self, recipe: Recipe) -> None:
        """Raises ValueError if the rest of a recipe contradicts the settings."""
        reason = self.unfit(recipe.detector)
        if reason is not None:
            raise ValueError(f"Recipe: method must not be {self.label} for {recipe.detector.detector}, {reason}")

    def advice(self, recipe: Recipe) -> Iterator[Finding]:
        """The doctor's findings on settings that switch the method off or contradict the published ones."""
        steps = recipe.schedule.steps
        sampled = range(0, steps, max(1, steps // 1000))
        phases = (self.phase(step, steps, pretrained=True) for step in sampled)
        if not any(phase.distill and not phase.detach_student for phase in phases):
            text = f"the phases of {self.label} leave no step in which the student is taught"
            yield Finding("problem", "switches", text)

    def pyramid_advice(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Iterator[Finding]:
        """The doctor's findings on the pyramids of student and teacher for the same images."""
        yield from ()

    def box_advice(self, median: MedianBox) -> Iterator[Finding]:
        """The doctor's findings on the size of the training boxes."""
        yield from ()

    def teaching_advice(self, log: Log) -> Iterator[Finding]:
        """The findings of the doctor and the report on the diagnostics that a run has logged.

        Args:
            log: the records of log.jsonl, and metrics.json as the last one.
        """
        figures = Figures.read(log)
        yield from teacher_findings(figures)
        yield from imitation_findings(figures, self.label)

    @classmethod
    def published(cls, detector: DetectorConfig) -> Setup:
        """The published hyper-parameters for a detector, used by the COCO recipes."""
        return Setup(cls())

    @classmethod
    def on_scenes(cls, detector: DetectorConfig) -> Setup:
        """The settings of the recipes on the generated scenes."""
        return cls.published(detector)

    @classmethod
    def view(cls) -> View | None:
        """The report's section on the trained networks; None for no section."""
        return None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Method:
        """The settings stored in a recipe.json. Raises: ValueError if a field is unknown, missing or ill-typed."""
        return decode(cls, values, "method", kinds())


@dataclass(frozen=True, kw_only=True)
class FeatureMethod(Method):
    """A method with a loss weight and an optional final part of the run without distillation.

    Args:
        weight: weight of the distillation loss.
        final_fraction: last fraction of the run, without distillation.
    """

    weight: float = 1.0
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"{type(self).__name__}: weight", "0 or more", self.weight)
        require_fraction(self, "final_fraction")

    def phase(self, step: int, steps: int, *, pretrained: bool) -> Phase:
        return Phase(distill=step < steps - steps_of(self.final_fraction, steps))

    def advice(self, recipe: Recipe) -> Iterator[Finding]:
        if self.weight == 0:
            text = f"{self.label}'s weight is 0: it teaches nothing; set --method.weight"
            yield Finding("problem", "switches", text)
        yield from super().advice(recipe)


@dataclass(frozen=True)
class Combined(Method):
    """Several methods on one student: their losses are summed in every step; each method keeps its own phases.

    A subclass declares one field per method, with the name of its entry in the distiller's ModuleDict, and for each
    method except the last a field `<name>_optimizer` (None uses the student's optimiser). The last method uses the
    recipe's `method_optimizer`.
    """

    def __post_init__(self) -> None:
        for name, kind in self._part_types().items():
            value = getattr(self, name)
            require(type(value) is kind, f"{type(self).__name__}: {name}", f"a {kind.__name__}", value)

    def build(self, given: Given) -> nn.ModuleDict:
        return nn.ModuleDict({name: part.build(given) for name, part in self.parts().items()})

    @classmethod
    def of(cls, first: Method | None, last: Method | None, optimizer: OptimizerConfig | None) -> Combined:
        """Combines two methods; `optimizer` is the optimiser of the first method's parameters."""
        one, two = cls._part_types()
        return cls(**{one: first, two: last, f"{one}_optimizer": optimizer})

    @classmethod
    def _part_types(cls) -> dict[str, type[Method]]:
        """The fields that hold methods: name -> class, which is also the field's default factory."""
        found: dict[str, Any] = {item.name: item.default_factory for item in dataclasses.fields(cls)}
        return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Method)}

    def parts(self) -> dict[str, Method]:
        return {name: getattr(self, name) for name in self._part_types()}

    @property
    def needs_masks(self) -> bool:
        return any(part.needs_masks for part in self.parts().values())

    def phase(self, step: int, steps: int, *, pretrained: bool) -> Phase:
        parts = {name: part.phase(step, steps, pretrained=pretrained) for name, part in self.parts().items()}
        phases = parts.values()
        return Phase(
            distill=any(phase.distill for phase in phases),
            detach_student=all(phase.detach_student for phase in phases),
            train_backbone=all(phase.train_backbone for phase in phases),
            parts=tuple(parts.items()),
        )

    def optimizers(self, optimizer: OptimizerConfig | None) -> dict[str, tuple[str, OptimizerConfig | None]]:
        *others, last = self._part_types()
        own = {f"{name}.": (name, getattr(self, f"{name}_optimizer")) for name in others}
        return {f"{last}.": ("method", optimizer), **own}

    def scaled(self, factor: float) -> Combined:
        *others, _ = self._part_types()
        rates = {f"{name}_optimizer": getattr(self, f"{name}_optimizer") for name in others}
        changed = {name: rate and rate.scaled(factor) for name, rate in rates.items()}
        return dataclasses.replace(self, **changed)

    def check(self, recipe: Recipe) -> None:
        for part in self.parts().values():
            part.check(recipe)

    def advice(self, recipe: Recipe) -> Iterator[Finding]:
        for part in self.parts().values():
            yield from part.advice(recipe)

    def pyramid_advice(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Iterator[Finding]:
        for part in self.parts().values():
            yield from part.pyramid_advice(student, teacher)

    def box_advice(self, median: MedianBox) -> Iterator[Finding]:
        for part in self.parts().values():
            yield from part.box_advice(median)

    def teaching_advice(self, log: Log) -> Iterator[Finding]:
        parts = self.parts().items()
        found = (one for name, part in parts for one in part.teaching_advice(log_of_part(log, name)))
        yield from dict.fromkeys(found)  # once, if several methods share the teacher


def kinds() -> dict[str, type[Method]]:
    """All imported method classes by kind, including the user's."""
    found: dict[str, type[Method]] = {}
    waiting: list[type[Method]] = [Method]
    while waiting:
        method = waiting.pop()
        waiting += method.__subclasses__()
        if "kind" in vars(method):
            found[method.kind] = method
    return dict(sorted(found.items()))
