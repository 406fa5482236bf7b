"""Distillation in a codebase that fastkd has never seen: python examples/bring_your_own.py [DATA] [STEPS] [METHOD]

The detector gives a score and a box in every cell; what fastkd needs of it is one HostStep in the training loop.
"""

from __future__ import annotations

import itertools
import sys

import torch
from scenes import CLASSES, loader
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.integrations import Distillation, HostStep, make_batch


class OwnDetector(nn.Module):
    """Levels of /8 and /16 with different channels, and one 1x1 convolution on each."""

    def __init__(self, width: int):
        super().__init__()
        widths, layers = [3, width, width, 2 * width, 4 * width], []
        for inputs, outputs in itertools.pairwise(widths):
            layers.append(nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()))
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ModuleList(nn.Conv2d(channels, CLASSES + 4, 1) for channels in widths[-2:])

    def features(self, images: Tensor) -> list[Tensor]:
        levels = [images]
        for layer in self.layers:
            levels.append(layer(levels[-1]))
        return levels[-2:]

    def loss(self, levels: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The cell under the centre of an object learns its class and box."""
        scores, boxes = torch.zeros(()), torch.zeros(())
        for level, head in zip(levels, self.heads):
            output, stride = head(level), 128 // level.shape[3]
            wanted = torch.zeros_like(output[:, :CLASSES])
            for image, target in enumerate(targets):
                x, y = ((target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2 / stride).long().unbind(1)
                wanted[image, target["labels"], y, x] = 1
                boxes = boxes + F.l1_loss(output[image, CLASSES:, y, x].t(), target["boxes"] / 128, reduction="sum")
            scores = scores + F.binary_cross_entropy_with_logits(output[:, :CLASSES], wanted, reduction="sum")
        return {"score": scores / len(targets), "box": boxes / len(targets)}


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
