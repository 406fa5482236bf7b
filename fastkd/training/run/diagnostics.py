"""The diagnostics of a run: the methods' figures in logged steps, and the AP of the teachers at evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkd.detectors import Detector
from fastkd.distillers import Distiller
from fastkd.distillers.protocol import Ratio
from fastkd.files import write_json
from fastkd.training.run.directory import read_json
from fastkd.training.schedule import phase_at
from fastkd.training.step import FrozenTeacher
from fastkd.types import Batch, Detections

if TYPE_CHECKING:
    from fastkd.training.trainer import Trainer


class StepDiagnostics:
    """Sums the figures of one step over its micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, figures: dict[str, Ratio]) -> None:
        """Adds a micro-batch; the values stay on their device until `take`."""
        for name, pair in figures.items():
            value = torch.stack([part.detach().double() for part in pair])
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The figures, without those that no object defines; resets the sums.

        Args:
            mean: averages a CPU tensor over all processes, each of which calls `take` after the same steps.
        """
        names, sums = list(self._sums), list(self._sums.values())
        self._sums = {}
        pairs = mean(torch.stack(sums).cpu()).tolist() if names else []
        return {name: total / number for name, (total, number) in zip(names, pairs) if number > 0}


class InstructiveDetector(nn.Module):
    """The student's head on the instructive pyramid of each batch, with the interface that `evaluate` needs.

    Args:
        detector: the student.
        distiller: makes an instructive pyramid; given the labels of the images to be detected on.
    """

    def __init__(self, detector: Detector, distiller: Distiller):
        super().__init__()
        self.detector, self.distiller = detector, distiller

    def features(self, images: Tensor) -> list[Tensor]:
        """The student's pyramid."""
        return self.detector.features(images)

    def detect(self, pyramid: list[Tensor], batch: Batch) -> list[Detections]:
        """Boxes without masks, which the diagnostics do not measure."""
        found = self.detector.detect(self.distiller.instruct(pyramid, batch), batch)
        return [Detections(one.boxes, one.scores, one.labels) for one in found]


def evaluate_teachers(trainer: Trainer) -> dict[str, float]:
    """AP of what teaches the student, on its validation set; all processes call it.

    Returns: "teacher_AP" of a trained teacher; "instructive_AP" of each method that was active in the last step.
    """
    module, phase = trainer.module, phase_at(trainer.recipe, trainer.step - 1)
    found: dict[str, float | None] = {}
    if module.teacher is not None:
        found["teacher_AP"] = _teacher_ap(trainer, module.teacher)
    for name, distiller in module.instructing(phase).items():
        metrics, _ = trainer.evaluation.run(
            InstructiveDetector(module.detector, distiller), progress=trainer.console.is_terminal
        )
        found[f"{name}.instructive_AP" if name else "instructive_AP"] = metrics["bbox"]["AP"]
    return {name: value for name, value in found.items() if value is not None}


def _teacher_ap(trainer: Trainer, teacher: FrozenTeacher) -> float | None:
    """The teacher's AP, measured once and kept in teacher.json with the checksums of teacher and validation set."""
    path, group, built = trainer.run_dir / "teacher.json", trainer.group, trainer.built
    key = {"teacher_sha256": built.teacher_sha256, "data_sha256": built.val_set.fingerprint}
    kept: dict[str, Any] = group.on_rank0(lambda: read_json(path)) or {}
    if {name: kept.get(name) for name in key} != key:
        metrics, _ = trainer.evaluation.run(teacher.detector, progress=trainer.console.is_terminal)
        box = {name: value for name, value in metrics["bbox"].items() if name != "per_class"}
        kept = {**key, "teacher": built.recipe.teacher, "bbox": box}
        group.on_rank0(lambda: write_json(path, kept))
    return kept["bbox"]["AP"]
