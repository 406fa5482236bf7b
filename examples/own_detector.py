"""A detector of one's own in fastkd's trainer: python examples/own_detector.py [DATA] [RUN_DIR] [STEPS]

Trains a wider one as teacher, then the small one with LGD and with ICD. The same from the command line, in this folder:
    fastkd train scenes-retinanet-lgd --detector own_detector:TinyDetector --data.root ../data/scenes
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

from fastkd.data import generate_scenes
from fastkd.detectors import DetectorConfig, use_detector
from fastkd.training import Recipe, RunResult, get_recipe, train, with_detector
from fastkd.types import Batch, Detections


class TinyDetector(nn.Module):
    """Scores and boxes in every cell of three levels; the cells around an object's centre answer for it."""

    strides = (8, 16, 32)

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.num_classes, width = config.num_classes, int(128 * config.width)
        widths = itertools.pairwise([3, width, width, config.channels, config.channels, config.channels])
        self.backbone = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), nn.ReLU())
            for a, b in widths
        )
        last = nn.Conv2d(config.channels, self.num_classes + 4, 1)
        nn.init.constant_(last.bias[: self.num_classes].detach(), -4.0)  # few cells hold an object
        self.head = nn.Sequential(nn.Conv2d(config.channels, config.channels, 3, 1, 1), nn.ReLU(), last)

    def features(self, images: Tensor) -> list[Tensor]:
        return list(itertools.accumulate(self.backbone, lambda x, stage: stage(x), initial=images))[-3:]

    def parts(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "head": self.head}

    def predict(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits [B, N, classes] and boxes [B, N, 4] of all cells, their centres [N, 2] and strides [N]."""
        levels = []
        for stride, level in zip(self.strides, pyramid, strict=True):
            rows, columns = (torch.arange(side, device=level.device) + 0.5 for side in level.shape[2:])
            centres = torch.cartesian_prod(rows, columns).flip(1) * stride
            logits, sides = self.head(level).float().flatten(2).mT.split([self.num_classes, 4], 2)
            sides = sides.clamp(max=5).exp() * stride
            boxes = torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], 2)
            levels.append((logits, boxes, centres, torch.full_like(centres[:, 0], stride)))
        logits, boxes, centres, strides = zip(*levels)
        return torch.cat(logits, 1), torch.cat(boxes, 1), torch.cat(centres), torch.cat(strides)

    def loss(self, pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        logits, boxes, centres, strides = self.predict(pyramid)
        low, high = batch.boxes.split(2, 1)
        own = 2 ** ((high - low).amax(1) / 6).log2().round().clamp(3, 5)  # an object's level, as its stride
        near = ((low + high)[:, None] / 2 - centres).abs().amax(2) < strides  # [K, N]
        which, cell = (near & ((strides - own[:, None]).abs() < 1)).nonzero(as_tuple=True)
        image, count = batch.image_index[which], max(1, len(which))
        wanted = torch.zeros_like(logits)
        wanted[image, cell, batch.labels[which]] = 1
        return {
            "classification": sigmoid_focal_loss(logits, wanted, reduction="sum") / count,
            "box": generalized_box_iou_loss(boxes[image, cell], batch.boxes[which], reduction="sum") / count,
        }

    @torch.no_grad()
    def detect(self, pyramid: list[Tensor], batch: Batch) -> list[Detections]:
        logits, boxes, _, _ = self.predict(pyramid)
        found = []
        for scores, cells, size in zip(logits.sigmoid(), boxes, batch.image_sizes.tolist(), strict=True):
            best, index = scores.flatten().topk(min(300, scores.numel()))
            inside, labels = clip_boxes_to_image(cells[index // self.num_classes], size), index % self.num_classes
            kept = batched_nms(inside, best, labels, 0.5)[:100]
            found.append(Detections(inside[kept], best[kept], labels[kept]))
        return found


def recipe_of(method: str, data: Path, steps: int, teacher: Path | None = None) -> Recipe:
    recipe = with_detector(get_recipe(f"scenes-retinanet-{method}"), use_detector(TinyDetector))
    return dataclasses.replace(
        recipe,
        name=f"tiny-{method}",
        detector=dataclasses.replace(recipe.detector, width=1.0 if method == "teacher" else 0.25),
        data=dataclasses.replace(recipe.data, root=str(data)),
        teacher=teacher and str(teacher),
        schedule=dataclasses.replace(recipe.schedule, steps=steps),
    )


def main(data: Path = Path("data/scenes"), run_dir: Path = Path("runs/tiny"), steps: int = 600) -> list[RunResult]:
    if not data.exists():
        generate_scenes(data, train=8000, val=500)
    teacher = train(recipe_of("teacher", data, steps), run_dir / "teacher", resume=True)
    lgd = train(recipe_of("lgd", data, steps), run_dir / "lgd", resume=True)
    icd = recipe_of("icd", data, steps, run_dir / "teacher/student.safetensors")
    return [teacher, lgd, train(icd, run_dir / "icd", resume=True)]


if __name__ == "__main__":
    kinds = (Path, Path, int)
    sys.exit(max(result.exit_code for result in main(*(kind(text) for kind, text in zip(kinds, sys.argv[1:])))))
