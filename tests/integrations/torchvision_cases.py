"""Small torchvision detectors with random weights, and batches for them."""

import torch
from torch import nn
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    MaskRCNN,
    RetinaNet,
    ssd,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

CLASSES = 5
NAMES = ["retinanet", "fcos", "ssd", "ssdlite", "faster-rcnn", "mask-rcnn"]
SIZE = (96, 128)


class BasicNet(nn.Module):
    """Five strided convolutions with batch norms, named as a ResNet's stages."""

    def __init__(self, width=16, norm=nn.BatchNorm2d):
        super().__init__()
        stages, inputs = [], 3
        for stage in range(5):
            outputs = width * min(2**stage, 4)
            stages.append(nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), norm(outputs), nn.ReLU()))
            inputs = outputs
        self.stem, self.layer1, self.layer2, self.layer3, self.layer4 = stages

    def forward(self, x):
        for stage in self.children():
            x = stage(x)
        return x


def fpn(*, dense, channels, width=16, norm=nn.BatchNorm2d):
    """A pyramid of /8../128 or /4../64."""
    layers = ("layer2", "layer3", "layer4") if dense else ("layer1", "layer2", "layer3", "layer4")
    widths = [width * min(2 ** int(name[-1]), 4) for name in layers]
    extra = LastLevelP6P7(channels, channels) if dense else LastLevelMaxPool()
    returned = {name: str(index) for index, name in enumerate(layers)}
    return BackboneWithFPN(BasicNet(width, norm), returned, widths, channels, extra_blocks=extra)


def detector(name, *, channels=32, width=16, norm=nn.BatchNorm2d, classes=CLASSES, seed=0, **options):
    """A detector of random weights. classes: of objects; SSD and R-CNN have a background besides."""
    torch.manual_seed(seed)
    sizes = {"min_size": SIZE[0], "max_size": SIZE[1]} | options
    dense = fpn(dense=True, channels=channels, width=width, norm=norm)
    if name == "retinanet":
        return RetinaNet(dense, classes, **sizes)
    if name == "fcos":
        return FCOS(dense, classes, **sizes)
    if name == "ssdlite":
        return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes + 1)
    if name == "ssd":
        generator = ssd.DefaultBoxGenerator([[2]] * 5)
        return ssd.SSD(dense, generator, SIZE, classes + 1, head=ssd.SSDHead([channels] * 5, [4] * 5, classes + 1))
    pyramid = fpn(dense=False, channels=channels, width=width, norm=norm)
    two_stage = {"rpn_pre_nms_top_n_train": 100, "rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 16}
    two_stage |= {"box_detections_per_img": 5}
    kind = MaskRCNN if name == "mask-rcnn" else FasterRCNN
    return kind(pyramid, classes + 1, **sizes, **two_stage)


def first_label(name):
    """The label of the first class."""
    return 0 if name in ("retinanet", "fcos") else 1


def batch(name, counts=(3, 1), *, seed=0, size=SIZE, classes=CLASSES):
    """Images in [0, 1] and targets with boxes, labels and masks."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for count in counts:
        images.append(torch.rand(3, *size, generator=generator))
        low = torch.rand(count, 2, generator=generator) * torch.tensor([size[1] / 2, size[0] / 2])
        wh = 12 + torch.rand(count, 2, generator=generator) * torch.tensor([size[1] / 3, size[0] / 3])
        boxes = torch.cat([low, low + wh], 1)
        masks = torch.zeros(count, *size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist()):
            mask[y1:y2, x1:x2] = 1
        labels = torch.randint(first_label(name), first_label(name) + classes, (count,), generator=generator)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return images, targets
