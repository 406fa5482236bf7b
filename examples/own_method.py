"""A method of one's own in fastkd's trainer: python examples/own_method.py [DATA] [RUN_DIR] [STEPS]

The student's features take the direction of the teacher's: 1 - cosine of the angle, averaged over cells and levels.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fastkd.data import generate_scenes
from fastkd.distillers import Distilled, Distiller
from fastkd.training import FeatureMethod, RunResult, get_recipe, train


class Cosine(Distiller):
    needs_teacher = True

    def __init__(self, channels: int, teacher_channels: int, weight: float):
        super().__init__()
        self.weight, self.adapter = weight, nn.Conv2d(channels, teacher_channels, 1)

    def forward(self, student, batch, teacher=None, *, detach_student=False, prepared=None) -> Distilled:
        levels = [level.detach() if detach_student else level for level in student]
        pairs = zip(levels, teacher, strict=True)  # [B, C, H_l, W_l] each
        angles = [1 - F.cosine_similarity(self.adapter(level), target, dim=1).mean() for level, target in pairs]
        return Distilled({"cosine_distill": self.weight * torch.stack(angles).mean()})


@dataclass(frozen=True)
class CosineConfig(FeatureMethod):
    kind, label, needs_teacher = "cosine", "Cosine", True

    def build(self, given) -> Cosine:
        return Cosine(given.student.channels, given.teacher.channels, self.weight)


def main(data: Path = Path("data/scenes"), run_dir: Path = Path("runs/cosine"), steps: int = 600) -> RunResult:
    if not data.exists():
        generate_scenes(data, train=8000, val=500)
    recipe = get_recipe("scenes-retinanet-pkd")  # the same student, teacher and schedule
    recipe = dataclasses.replace(
        recipe,
        name="cosine",
        data=dataclasses.replace(recipe.data, root=str(data)),
        method=CosineConfig(weight=2.0, final_fraction=0.2),
        schedule=dataclasses.replace(recipe.schedule, steps=steps),
    )
    return train(recipe, run_dir)


if __name__ == "__main__":
    kinds = (Path, Path, int)
    sys.exit(main(*(kind(text) for kind, text in zip(kinds, sys.argv[1:]))).exit_code)
