"""Loads the networks of a run for visualisation: the student, its distiller, and the teacher if there is one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fastkd.assets import resolve
from fastkd.data.loader import collate
from fastkd.data.transforms import Geometry, resized_size
from fastkd.detectors import Detector, load_detector
from fastkd.report.runs import Run
from fastkd.report.sources import ValidationSet
from fastkd.types import Batch, ClassPriors


@dataclass
class Networks:
    """The networks of a run in eval mode on one device, and their input sizes."""

    student: Detector
    distiller: Any
    teacher: Detector | None
    device: torch.device
    short_side: int
    max_side: int
    divisor: int

    def level_name(self, level: int) -> str:
        """The name of a level as in the papers: P_n has stride 2^n."""
        return f"P{int(self.student.strides[level]).bit_length() - 1}"

    def batch(self, source: ValidationSet, image_id: int) -> tuple[Batch, np.ndarray]:
        """One validation image as a Batch, and the resized picture, uint8 [h, w, 3]."""
        image = source.image(image_id)
        size = resized_size(image.shape[1], image.shape[0], self.short_side, self.max_side)
        geometry = Geometry(*size, flip=False)
        height, width = (-(-side // self.divisor) * self.divisor for side in size)
        item = (source.position(image_id), image, geometry, 0)
        return collate(source.dataset, [item], (height, width)).to(self.device), geometry.image(image)


def load_networks(run: Run, device: str) -> Networks:
    """The networks of a distilled run.

    Raises: ValueError, OSError, KeyError, TypeError or RuntimeError naming what is missing or does not fit.
    """
    for name in ("student.safetensors", "method.safetensors"):
        if not (run.path / name).is_file():
            raise ValueError(f"{name} is missing in {run.path}")
    student, _ = load_detector(run.path / "student.safetensors")
    settings = run.settings
    teacher = load_detector(_teacher_file(run))[0] if settings.needs_teacher else None
    priors = _priors(run.path / "priors.json") if settings.needs_priors else None
    distiller = settings.from_dict(run.recipe["method"]).distiller(student, teacher, priors)
    distiller.load_state_dict(load_file(run.path / "method.safetensors"))
    target = torch.device(device)
    for network in (student, distiller, teacher):
        if network is not None:
            network.to(target).eval()
    sizes = [int(run.recipe["data"][name]) for name in ("val_short_side", "max_side", "divisor")]
    return Networks(student, distiller, teacher, target, *sizes)


def _teacher_file(run: Run) -> Path:
    name = run.recipe.get("teacher")
    if not isinstance(name, str) or not resolve(name).is_file():
        raise ValueError(f"the teacher's file {name} is missing")
    return resolve(name)


def _priors(file: Path) -> ClassPriors:
    if not file.is_file():
        raise ValueError(f"priors.json is missing in {file.parent}")
    values = json.loads(file.read_text(encoding="utf-8"))
    return ClassPriors(*(torch.tensor(values[name], dtype=torch.float64) for name in ("frequency", "mean", "std")))
