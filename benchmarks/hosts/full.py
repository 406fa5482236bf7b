"""Seconds of a step at the sizes that people train: a tiny student exaggerates what a method and its teacher add.

Random weights and images: only times are measured.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hosts.plan import CLASSES, OWN
from benchmarks.hosts.runs import normalised, times_by_method
from benchmarks.hosts.scenes import write_yolo
from fastkd.integrations.methods import METHODS, needs_teacher

STEPS = 4  # the first does not count
OBJECTS = 8  # in an image
Tick = Callable[..., None]  # called after each step


def random_targets(count: int, height: int, width: int, device: str) -> list[dict[str, Tensor]]:
    """Boxes xyxy of 32 to 160 pixels, and labels."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for _ in range(count):
        sides = torch.rand(OBJECTS, 2, generator=generator) * 128 + 32
        corner = torch.rand(OBJECTS, 2, generator=generator) * (torch.tensor([width, height]) - sides)
        labels = torch.randint(CLASSES, (OBJECTS,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + sides], 1).to(device), "labels": labels.to(device)})
    return targets


def taught(method: str) -> bool:
    """Whether `method` is one of ours, not the host's own, and needs a teacher."""
    return method in METHODS and needs_teacher(method)


def torchvision(method: str, device: str, data: Path, tick: Tick) -> None:
    """RetinaNet-R50 on an image of 800 x 1216, taught by RetinaNet-R101."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    from fastkd.integrations.torchvision import attach

    def build(name: str) -> nn.Module:
        extra = LastLevelP6P7(256, 256)
        body = resnet_fpn_backbone(backbone_name=name, weights=None, returned_layers=[2, 3, 4], extra_blocks=extra)
        return RetinaNet(body, CLASSES).to(device)

    model = build("resnet50").train()
    teacher = build("resnet101").eval() if taught(method) else None
    kd = attach(model, method, teacher=teacher, num_classes=CLASSES) if method != "alone" else None
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    images, targets = [torch.rand(3, 800, 1216, device=device)], random_targets(1, 800, 1216, device)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        optimizer.step()
        if kd is not None:
            kd.step()
        tick()


def transformers(method: str, device: str, data: Path, tick: Tick) -> None:
    """RT-DETR-R18 on two images of 640 x 640, taught by RT-DETR-R50."""
    import transformers as hf

    from fastkd.integrations.transformers import attach

    def build(depths: list[int], layer: str, sizes: list[int], layers: int) -> nn.Module:
        backbone = hf.RTDetrResNetConfig(
            depths=depths, layer_type=layer, hidden_sizes=sizes, out_features=["stage2", "stage3", "stage4"]
        )
        config = hf.RTDetrConfig(
            backbone_config=backbone, encoder_in_channels=sizes[1:], decoder_layers=layers, num_labels=CLASSES
        )
        return hf.RTDetrForObjectDetection(config).to(device)

    model = build([2, 2, 2, 2], "basic", [64, 128, 256, 512], 3).train()
    teacher = build([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048], 6).eval() if taught(method) else None
    kd = attach(model, method, teacher=teacher, num_classes=CLASSES) if method != "alone" else None
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    images = torch.rand(2, 3, 640, 640, device=device)
    labels = [normalised(target, 640) for target in random_targets(2, 640, 640, device)]
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        if kd is not None:
            kd.step()
        tick()


def ultralytics(method: str, device: str, data: Path, tick: Tick) -> None:
    """YOLO11s on two images of 640 x 640, taught by YOLO11l."""
    os.environ.setdefault("YOLO_OFFLINE", "true")
    from ultralytics import YOLO

    from fastkd.integrations.ultralytics import attach

    scenes, batch = write_yolo(data), 2
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher.pt"
        YOLO("yolo11l.yaml").save(teacher)
        options: dict[str, Any] = {
            "data": str(scenes), "epochs": 1, "fraction": STEPS * batch / len(list((data / "train").iterdir())),
            "imgsz": 640, "batch": batch, "nbs": batch, "workers": 0, "device": device if device == "cpu" else 0,
            "plots": False, "amp": False, "val": False, "save": False, "project": folder, "verbose": False,
        }  # fmt: skip
        model = YOLO("yolo11s.yaml")
        model.add_callback("on_train_batch_end", tick)
        if method == OWN:
            options["distill_model"] = str(teacher)
        elif method != "alone":
            kd = attach(model, method, teacher=YOLO(teacher) if taught(method) else None, num_classes=CLASSES)
            options["trainer"] = kd.trainer
        model.train(**options)


SIZES: dict[str, tuple[str, str, Callable[[str, str, Path, Tick], None]]] = {
    "torchvision": ("RetinaNet-R50, one image of 800 x 1216", "RetinaNet-R101", torchvision),
    "transformers": ("RT-DETR-R18, two images of 640 x 640", "RT-DETR-R50", transformers),
    "ultralytics": ("YOLO11s, two images of 640 x 640", "YOLO11l", ultralytics),
}
"""host -> (student, teacher, trains STEPS steps with a method)"""


def full_times(host: str, device: str, data: Path) -> dict[str, float]:
    """Seconds of a step by method, and with the reference backend ("icd reference"): CPU time on a CPU."""
    return times_by_method(host, device, lambda method, clock: SIZES[host][2](method, device, data, clock.tick))
