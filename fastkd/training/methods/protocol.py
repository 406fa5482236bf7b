"""What the trainer asks of a method of distillation: its settings, and what follows from them for a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from fastkd.codec import decode, require, require_fraction
from fastkd.detectors import Detector, DetectorConfig
from fastkd.training.doctor.finding import Finding
from fastkd.training.methods.phase import Phase, steps_of
from fastkd.training.optimizer_config import OptimizerConfig
from fastkd.types import ClassPriors

if TYPE_CHECKING:
    from fastkd.report.insides import View
    from fastkd.training.config import Recipe


@dataclass(frozen=True)
class Setup:
    """How the named recipes train with a method.

    Args:
        method: its settings.
        optimizer: of the method's own parameters; None gives them to the student's.
        inherit: start the student's neck and head from the teacher's.
        schedule: of COCO recipes, "1x", "2x" or "3x".
    """

    method: Method
    optimizer: OptimizerConfig | None = None
    inherit: bool = False
    schedule: str = "1x"


@dataclass(frozen=True)
class Given:
    """What a distiller is built from.

    Args:
        student: the detector that learns.
        trained: the teacher, where there is one.
        measured: class priors of the training set, where the method needs them.
        recompute: keep no activations that can be computed again in the backward pass.
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
    """A method of distillation, as a recipe names it. A subclass is a frozen dataclass of settings with defaults.

    A subclass sets `kind` and `label` and implements `build`; the other methods have defaults. `FeatureMethod` below
    has a weight and an end, as most have.

    Attributes:
        kind: names it in recipe.json and in the names of recipes: lower case, without "-" if it has named recipes.
        label: names it in tables and messages.
        needs_teacher: whether a recipe must name a trained teacher; as the distiller's.
        needs_priors: whether `build` is given the class priors of the training set.
        compared_with: kind of the method whose extra cost the report compares with; None compares with none.
    """

    kind: ClassVar[str]
    label: ClassVar[str]
    needs_teacher: ClassVar[bool] = False
    needs_priors: ClassVar[bool] = False
    compared_with: ClassVar[str | None] = None

    def build(self, given: Given) -> nn.Module:
        """The distiller with fresh weights from torch's global generator.

        Returns: a Distiller; of several methods an nn.ModuleDict of them, named as in `parts`.
        Raises: ValueError if the method cannot work with what is given.
        """
        raise NotImplementedError(f"{type(self).__name__}.build must be implemented")

    def distiller(self, student: Detector, teacher: Detector | None, priors: ClassPriors | None) -> nn.Module:
        """`build` for callers that know no `Given`."""
        return self.build(Given(student, teacher, priors))

    def parts(self) -> dict[str, Method]:
        """The methods of which it is made, by name: itself alone as ""."""
        return {"": self}

    def phase(self, step: int, steps: int, *, pretrained: bool) -> Phase:
        """What is switched on in step `step` (from 0) of `steps`.

        Args:
            pretrained: whether the student's backbone starts from trained weights.
        """
        return Phase()

    def optimizers(self, optimizer: OptimizerConfig | None) -> dict[str, tuple[str, OptimizerConfig | None]]:
        """The optimisers of its own parameters: prefix of their names in the distiller -> (name, settings).

        Args:
            optimizer: the recipe's `method_optimizer`.
        """
        return {"": ("method", optimizer)}

    def scaled(self, factor: float) -> Method:
        """For batches `factor` times as large: learning rates among the settings are multiplied."""
        return self

    @classmethod
    def unfit(cls, detector: DetectorConfig) -> str | None:
        """Why it cannot train such a detector; None where it can."""
        return None

    def check(self, recipe: Recipe) -> None:
        """Raises ValueError if the rest of a recipe contradicts the settings."""
        reason = self.unfit(recipe.detector)
        if reason is not None:
            raise ValueError(f"Recipe: method must not be {self.label} for {recipe.detector.detector}, {reason}")

    def advice(self, recipe: Recipe) -> Iterator[Finding]:
        """The doctor's findings on settings that switch it off or contradict what was published."""
        steps = recipe.schedule.steps
        sampled = range(0, steps, max(1, steps // 1000))
        phases = (self.phase(step, steps, pretrained=True) for step in sampled)
        if not any(phase.distill and not phase.detach_student for phase in phases):
            text = f"the phases of {self.label} leave no step in which the student is taught"
            yield Finding("problem", "switches", text)

    def pyramid_advice(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Iterator[Finding]:
        """The doctor's findings on a student's and a teacher's pyramid of the same images."""
        yield from ()

    @classmethod
    def published(cls, detector: DetectorConfig) -> Setup:
        """The published hyper-parameters for a detector: what COCO recipes take."""
        return Setup(cls())

    @classmethod
    def on_scenes(cls, detector: DetectorConfig) -> Setup:
        """What recipes on the generated scenes take."""
        return cls.published(detector)

    @classmethod
    def view(cls) -> View | None:
        """What the report shows of the trained networks; None shows nothing."""
        return None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Method:
        """The settings stored in a recipe.json. Raises: ValueError if a field is unknown, missing or ill-typed."""
        return decode(cls, values, "method", kinds())


@dataclass(frozen=True, kw_only=True)
class FeatureMethod(Method):
    """A method with a weight, which may end before the run does.

    Args:
        weight: of the distillation loss.
        final_fraction: last part of the run without distillation.
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
    """Several methods on one student: their losses add up in every step, each method in its own phases.

    A subclass declares one field for each method, named as its part of the distiller, and for all of them but the last
    `<name>_optimizer`; the last one's optimiser is the recipe's `method_optimizer`. None gives parameters to the
    student's optimiser.
    """

    def __post_init__(self) -> None:
        for name, kind in self._part_types().items():
            value = getattr(self, name)
            require(type(value) is kind, f"{type(self).__name__}: {name}", f"a {kind.__name__}", value)

    def build(self, given: Given) -> nn.ModuleDict:
        return nn.ModuleDict({name: part.build(given) for name, part in self.parts().items()})

    @classmethod
    def of(cls, first: Method | None, last: Method | None, optimizer: OptimizerConfig | None) -> Combined:
        """Two methods, and the optimiser of the first one's own parameters."""
        one, two = cls._part_types()
        return cls(**{one: first, two: last, f"{one}_optimizer": optimizer})

    @classmethod
    def _part_types(cls) -> dict[str, type[Method]]:
        """The fields that hold methods, with their classes: a default of each is a fresh one."""
        found: dict[str, Any] = {item.name: item.default_factory for item in dataclasses.fields(cls)}
        return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Method)}

    def parts(self) -> dict[str, Method]:
        return {name: getattr(self, name) for name in self._part_types()}

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


def kinds() -> dict[str, type[Method]]:
    """Every method whose module has been imported, by kind: ours, and a user's own."""
    found: dict[str, type[Method]] = {}
    waiting: list[type[Method]] = [Method]
    while waiting:
        method = waiting.pop()
        waiting += method.__subclasses__()
        if "kind" in vars(method):
            found[method.kind] = method
    return dict(sorted(found.items()))
