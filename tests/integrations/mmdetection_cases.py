"""A detector with the order of calls, argument and attribute names of mmdetection's SingleStageDetector, and data."""

import types

import torch
from torch import nn
from torchvision_cases import CLASSES, fpn


class Neck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.inner = fpn(dense=True, channels=channels)

    def forward(self, images):
        return tuple(self.inner(images).values())


class Head(nn.Module):
    """Logits of each level, and no box deltas."""

    use_sigmoid_cls = True
    num_classes = CLASSES

    def __init__(self, channels):
        super().__init__()
        self.norm, self.conv_cls = nn.BatchNorm2d(channels), nn.Conv2d(channels, CLASSES, 1)

    def forward(self, levels):
        return [self.conv_cls(self.norm(level)) for level in levels], []


class Detector(nn.Module):
    def __init__(self, channels=16):
        super().__init__()
        self.backbone, self.neck, self.bbox_head = nn.Identity(), Neck(channels), Head(channels)
        self.data_preprocessor = nn.Module()
        for name, value in (("mean", 120.0), ("std", 57.0)):
            self.data_preprocessor.register_buffer(name, torch.full((3, 1, 1), value), False)

    def extract_feat(self, inputs):
        return self.neck(self.backbone(inputs))

    def loss(self, inputs, data_samples):
        scores, _ = self.bbox_head(self.extract_feat(inputs))
        return {"loss_cls": [score.square().mean() for score in scores], "acc": scores[0].detach().mean()}

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return self.loss(inputs, data_samples) if mode == "loss" else self.extract_feat(inputs)


def data(seed=0):
    samples = []
    for index, shape in enumerate(((64, 96), (48, 64))):
        boxes = torch.tensor([[4.0, 4, 30, 40], [10, 8, 60, 44]])[: index + 1]
        if index:  # mmdetection's own box type
            boxes = types.SimpleNamespace(tensor=boxes)
        instances = types.SimpleNamespace(bboxes=boxes, labels=torch.arange(index + 1))
        samples.append(types.SimpleNamespace(gt_instances=instances, img_shape=shape))
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
    return {"inputs": images, "data_samples": samples}
