"""Baselines of `benchmarks.step`: torchvision's RetinaNet and Faster R-CNN in eager float32."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fastkd.types import Batch


def backbone(name: str, fine: bool) -> nn.Module:
    """ResNet with frozen batch norms and first two stages, and the feature pyramid, P2 .. P6 or P3 .. P7."""
    if fine:
        return resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=3)
    extra = LastLevelP6P7(256, 256)
    return resnet_fpn_backbone(
        backbone_name=name, weights=None, trainable_layers=3, returned_layers=[2, 3, 4], extra_blocks=extra
    )


class PlainDetector(nn.Module):
    """A torchvision detector with the two methods needed for a distillation step.

    Args:
        kind: "retinanet" or "faster_rcnn".
        num_classes: without background.
        name: of the ResNet.
    """

    def __init__(self, kind: str, num_classes: int, name: str = "resnet50"):
        super().__init__()
        self.two_stage = kind == "faster_rcnn"
        body = backbone(name, self.two_stage)
        if self.two_stage:
            self.model = FasterRCNN(body, num_classes + 1)
        else:
            sizes = tuple(
                (side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in (32, 64, 128, 256, 512)
            )
            anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
            self.model = RetinaNet(body, num_classes, anchor_generator=anchors)

    def features(self, images: Tensor) -> list[Tensor]:
        """The pyramid."""
        return list(self.model.backbone(images).values())

    def loss(self, pyramid: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """Torchvision's losses on a pyramid."""
        model, sizes = self.model, [tuple(size) for size in batch.image_sizes.tolist()]
        targets = [
            {"boxes": boxes, "labels": labels + self.two_stage}
            for boxes, labels in zip(batch.boxes.split(batch.counts), batch.labels.split(batch.counts))
        ]
        images = ImageList(batch.images, sizes)
        if self.two_stage:
            named = OrderedDict((name, level) for name, level in zip(("0", "1", "2", "3", "pool"), pyramid))
            proposals, losses = model.rpn(images, named, targets)
            return {**losses, **model.roi_heads(named, proposals, sizes, targets)[1]}
        return model.compute_loss(targets, model.head(pyramid), model.anchor_generator(images, pyramid))
