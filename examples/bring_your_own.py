"""Distillation in a codebase that fastkd has never seen: python examples/bring_your_own.py [DATA] [STEPS] [METHOD]"""

from __future__ import annotations

import itertools
import sys

import torch
from scenes import CLASSES, loader
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.integrations import Distillation, HostStep, make_batch


class OwnDetector(nn.Module):
    """Scores of the classes in every cell of /8 and /16, levels of different widths."""

    def __init__(self, width: int):
        super().__init__()
        widths = [3, width, width, 2 * width, 4 * width]
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairs
        )
        self.heads = nn.ModuleList(nn.Conv2d(channels, CLASSES, 1) for channels in widths[-2:])

    def features(self, images: Tensor) -> list[Tensor]:
        levels = list(itertools.accumulate(self.layers, lambda x, layer: layer(x), initial=images))
        return levels[-2:]

    def loss(self, levels: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The cell under the centre of an object scores its class."""
        losses = []
        for stride, level, head in zip((8, 16), levels, self.heads):
            scores = head(level)
            wanted = torch.zeros_like(scores)
            for image, target in enumerate(targets):
                x, y = ((target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2 / stride).long().unbind(1)
                wanted[image, target["labels"], y, x] = 1
            losses.append(F.binary_cross_entropy_with_logits(scores, wanted, pos_weight=torch.tensor(50.0)))
        return {"score": torch.stack(losses).sum()}


def main(data: str = "scenes", steps: int = 20, method: str = "icd") -> None:
    torch.manual_seed(0)
    student, teacher = OwnDetector(16), OwnDetector(32).eval()  # load a trained teacher here
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    kd = Distillation(method, num_classes=CLASSES, total_steps=steps, channels=32)
    batches = itertools.chain.from_iterable(itertools.repeat(loader(data)))
    for step, (images, targets) in enumerate(itertools.islice(batches, steps)):
        images = torch.stack(images)
        levels = student.features(images)
        losses = student.loss(levels, targets)

        sizes = [image.shape[1:] for image in images]
        boxes, labels = [t["boxes"] for t in targets], [t["labels"] for t in targets]
        batch = make_batch(images, sizes, boxes, labels, num_classes=CLASSES, seeds=range(4 * step, 4 * step + 4))
        with torch.no_grad():
            guides = teacher.features(images)
        losses |= kd(HostStep(batch, levels, guides, rerun=lambda others, t=targets: student.loss(others, t)))

        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        kd.step()
    print({name: round(loss.item(), 3) for name, loss in losses.items()})
    print(kd.report())


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]), *sys.argv[3:4])
