"""torchvision's own training loop with distillation: python examples/host_torchvision.py [DATA] [STEPS] [METHOD]"""

from __future__ import annotations

import itertools
import sys

import torch
from scenes import CLASSES, loader
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fastkd.integrations.torchvision import attach


def retinanet(backbone: str, channels: int) -> RetinaNet:
    """A RetinaNet of random weights on a pyramid of /8 to /128."""
    body = resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d,
                               returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))  # fmt: skip
    return RetinaNet(body, channels, min_size=128, max_size=128)


def train(model: nn.Module, data: str, steps: int, kd=None) -> dict[str, float]:
    """The loop as it was, and one line of ours."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    batches = itertools.chain.from_iterable(itertools.repeat(loader(data)))
    for images, targets in itertools.islice(batches, steps):
        losses = model(images, targets)  # holds "icd_distill", ... too
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if kd is not None:
            kd.step()
    return {name: round(loss.item(), 3) for name, loss in losses.items()}


def main(data: str = "scenes", steps: int = 20, method: str = "icd") -> None:
    torch.manual_seed(0)
    teacher, student = retinanet("resnet34", CLASSES), retinanet("resnet18", CLASSES)
    print("teacher:", train(teacher, data, steps))
    teacher.eval()
    kd = attach(student, method, teacher=None if method == "lgd" else teacher, num_classes=CLASSES, total_steps=steps)
    print("student:", train(student, data, steps, kd))
    print(kd.report())
    kd.detach()
    torch.save(student.state_dict(), "student.pth")  # the plain detector, nothing of ours


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]), *sys.argv[3:4])
