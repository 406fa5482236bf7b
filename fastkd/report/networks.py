"""Loads the networks of a run for looking inside: the student, its distiller, and the teacher where there is one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fastkd.report.runs import Run
from fastkd.types import Batch, ClassPriors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Networks:
    """The networks of a run in eval mode on one device, and the sizes at which images enter them."""

    student: nn.Module
    distiller: nn.Module
    teacher: nn.Module | None
    device: torch.device
    short_side: int
    max_side: int
    divisor: int

    def level_name(self, level: int) -> str:
        """P3, P4 ... as papers name the pyramid's levels: P_n has stride 2^n."""
        return f"P{int(self.student.strides[level]).bit_length() - 1}"

    def batch(self, source, image_id: int) -> tuple[Batch, np.ndarray]:
        """One validation image as the networks see it, and the resized picture itself, uint8 [h, w, 3]."""
        image, truth = source.image(image_id), source.truth(image_id)
        height, width = image.shape[:2]
        scale = min(self.short_side / min(height, width), self.max_side / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        picture = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255
        pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        padded = [-(-side // self.divisor) * self.divisor for side in size]
        images = torch.zeros(1, 3, *padded)
        images[0, :, : size[0], : size[1]] = pixels
        factors = torch.tensor([size[1] / width, size[0] / height] * 2, dtype=torch.float32)
        count = len(truth.labels)
        batch = Batch(
            images=images,
            image_sizes=torch.tensor([size]),
            boxes=torch.from_numpy(np.array(truth.boxes, dtype=np.float32)).reshape(-1, 4) * factors,
            labels=torch.from_numpy(np.array(truth.labels, dtype=np.int64)),
            image_index=torch.zeros(count, dtype=torch.int64),
            counts=[count],
            image_ids=[image_id],
            original_sizes=torch.tensor([[height, width]]),
            seeds=[0],
        )
        return batch.to(self.device), picture


def load_networks(run: Run, device: str) -> Networks:
    """The networks of a distilled run.

    Raises: ValueError, OSError, KeyError or RuntimeError naming what is missing or does not fit.
    """
    from fastkd.detectors import load_detector

    for name in ("student.safetensors", "method.safetensors"):
        if not (run.path / name).is_file():
            raise ValueError(f"{name} is missing in {run.path}")
    student, _ = load_detector(run.path / "student.safetensors")
    teacher = None
    if run.method != "lgd":
        teacher, _ = load_detector(_teacher_file(run))
    distiller = _distiller(run, student, teacher)
    distiller.load_state_dict(load_file(run.path / "method.safetensors"))
    device = torch.device(device)
    networks = [None if network is None else network.to(device).eval() for network in (student, distiller, teacher)]
    data = run.recipe.get("data", {})
    return Networks(*networks, device, int(data["val_short_side"]), int(data["max_side"]), int(data["divisor"]))


def _teacher_file(run: Run) -> Path:
    name = run.recipe.get("teacher")
    if not isinstance(name, str) or not Path(name).is_file():
        raise ValueError(f"the teacher's file {name} is missing")
    return Path(name)


def _distiller(run: Run, student: nn.Module, teacher: nn.Module | None) -> nn.Module:
    from fastkd.distillers import ICD, LGD

    values = {key: value for key, value in run.recipe["method"].items() if key != "type" and not key.endswith("_fraction")}
    if run.method == "lgd":
        return LGD(student.num_classes, student.channels, **values)
    return ICD(student.num_classes, _priors(run.path / "priors.json"), student.channels, teacher_channels=teacher.channels, **values)


def _priors(file: Path) -> ClassPriors:
    if not file.is_file():
        raise ValueError(f"priors.json is missing in {file.parent}")
    values = json.loads(file.read_text(encoding="utf-8"))
    return ClassPriors(*(torch.tensor(values[name], dtype=torch.float64) for name in ("frequency", "mean", "std")))
