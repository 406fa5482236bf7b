"""Small detectors and batches of coloured rectangles for the tests of detectors."""

from __future__ import annotations

import torch

from fastkd.detectors import DetectorConfig
from fastkd.types import Batch

KINDS = ("retinanet", "fcos", "atss", "poto", "condinst", "solov2", "faster_rcnn", "mask_rcnn")
WITH_MASKS = ("condinst", "solov2", "mask_rcnn")
WITHOUT_ANCHORS = ("fcos", "atss", "poto", "condinst", "solov2")


def small_config(kind: str, num_classes: int = 3, **changes) -> DetectorConfig:
    """A detector that trains on 64-pixel images in milliseconds."""
    values = {
        "detector": kind,
        "num_classes": num_classes,
        "backbone": "resnet18",
        "width": 0.25,
        "channels": 32,
        "norm": "bn",
        "anchor_base": 4.0,
        "roi_canonical_size": 28,
        "rpn_pre_nms_train": 100,
        "rpn_pre_nms_test": 100,
        "rpn_post_nms_train": 50,
        "rpn_post_nms_test": 50,
        "rpn_samples": 32,
        "roi_samples": 32,
        "box_head_channels": 64,
        "mask_head_channels": 16,
        "mask_branch_channels": 16,
        "instance_head_channels": 32,
        "kernel_channels": 16,
        "grids": (8, 6, 4, 3, 2),
    }
    return DetectorConfig(**(values | changes))


def rectangles(
    counts: list[int], *, size: tuple[int, int] = (64, 64), num_classes: int = 3, seed: int = 0, masks: bool = True
) -> Batch:
    """Rectangles on black, coloured by class; counts[b] of them in image b."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    images = torch.zeros(len(counts), 3, height, width)
    boxes, labels, index = [], [], []
    for image, count in enumerate(counts):
        for _ in range(count):
            side = 12 + 16 * torch.rand(2, generator=generator)
            corner = torch.rand(2, generator=generator) * (torch.tensor([width, height]) - side)
            box = torch.cat([corner, corner + side]).round()
            label = int(torch.randint(num_classes, (), generator=generator))
            x1, y1, x2, y2 = box.int().tolist()
            images[image, :, y1:y2, x1:x2] = 0.5
            images[image, label % 3, y1:y2, x1:x2] = 2.0
            boxes.append(box)
            labels.append(label)
            index.append(image)
    boxes = torch.stack(boxes) if boxes else torch.zeros(0, 4)
    return Batch(
        images=images,
        image_sizes=torch.tensor([[height, width]] * len(counts)),
        boxes=boxes,
        labels=torch.tensor(labels, dtype=torch.int64),
        image_index=torch.tensor(index, dtype=torch.int64),
        counts=list(counts),
        masks=_filled(boxes, height, width) if masks else None,
        image_ids=list(range(len(counts))),
        seeds=[1000 * seed + image for image in range(len(counts))],
    )


def _filled(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


def images_of(batch: Batch, start: int, end: int) -> Batch:
    """Images start .. end of a batch, as another process would hold them."""
    own = (batch.image_index >= start) & (batch.image_index < end)
    hidden = (batch.ignore_index >= start) & (batch.ignore_index < end)
    return Batch(
        images=batch.images[start:end],
        image_sizes=batch.image_sizes[start:end],
        boxes=batch.boxes[own],
        labels=batch.labels[own],
        image_index=batch.image_index[own] - start,
        counts=batch.counts[start:end],
        masks=None if batch.masks is None else batch.masks[own],
        ignore_boxes=batch.ignore_boxes[hidden],
        ignore_index=batch.ignore_index[hidden] - start,
        image_ids=batch.image_ids[start:end],
        seeds=batch.seeds[start:end],
    )
