"""A detector with the order of calls, argument and attribute names of detectron2's RetinaNet, and inputs for it."""

import sys
import types

import torch
from torch import nn
from torchvision_cases import CLASSES, fpn

SIZE = (64, 96)


class Backbone(nn.Module):
    size_divisibility = 32
    padding_constraints: dict = {}  # noqa: RUF012

    def __init__(self, channels):
        super().__init__()
        self.inner = fpn(dense=True, channels=channels)

    def forward(self, images):
        return {f"p{3 + level}": value for level, value in enumerate(self.inner(images).values())}


class Head(nn.Module):
    """Logits of each level, and no box deltas."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.cls_score = nn.BatchNorm2d(channels), nn.Conv2d(channels, CLASSES, 1)

    def forward(self, levels):
        return [self.cls_score(self.norm(level)) for level in levels], []


class MetaArchitecture(nn.Module):
    def __init__(self, channels=16):
        super().__init__()
        self.backbone, self.head = Backbone(channels), Head(channels)
        self.num_classes, self.loss_normalizer = CLASSES, 100.0
        self.register_buffer("pixel_mean", torch.tensor([103.5, 116.3, 123.7])[:, None, None], False)
        self.register_buffer("pixel_std", torch.full((3, 1, 1), 57.0), False)

    def preprocess_image(self, inputs):
        images = [(entry["image"] - self.pixel_mean) / self.pixel_std for entry in inputs]
        rows, columns = (-(-max(image.shape[side] for image in images) // 32) * 32 for side in (1, 2))
        padded = torch.zeros(len(images), 3, rows, columns)
        for target, image in zip(padded, images):
            target[:, : image.shape[1], : image.shape[2]] = image
        assert self.backbone.size_divisibility == 32
        return padded

    def forward(self, inputs):
        features = self.backbone(self.preprocess_image(inputs))
        scores, _ = self.head(list(features.values()))
        if not self.training:
            return scores
        count = sum(len(entry["instances"].gt_boxes.tensor) for entry in inputs)
        self.loss_normalizer = 0.9 * self.loss_normalizer + 0.1 * max(count, 1)
        loss = sum(score.square().sum() for score in scores) / self.loss_normalizer
        sys.modules["detectron2.utils.events"].EventStorage.current[-1].put_scalars(num_pos=count)
        return {"loss_cls": loss}


def inputs(seed=0):
    entries = []
    for index, (height, width) in enumerate((SIZE, (48, 64))):
        generator = torch.Generator().manual_seed(2 * seed + index)
        boxes = torch.tensor([[4.0, 4, 30, 40], [10, 8, 60, 44]])[: index + 1]
        instances = types.SimpleNamespace(
            gt_boxes=types.SimpleNamespace(tensor=boxes), gt_classes=torch.arange(index + 1)
        )
        image = torch.randint(0, 256, (3, height, width), generator=generator).float()
        entries.append({"image": image, "instances": instances})
    return entries
