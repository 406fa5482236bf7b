"""LGD's objects, boxes and dummies, and their descriptors (docs/methods.md section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.types import Batch

MASK_SIZE = 7


@dataclass
class Objects:
    """The objects of a batch: its ground-truth boxes, then dummy objects without a class (methods 2.1).

    Args:
        boxes: [K, 4] float32 xyxy, pixels of the padded batch.
        labels: [K] int64, -1 for dummies.
        image_index: [K] int64 in [0, B).
        masks: [K, H, W] bool over the padded batch, or None if objects cover their boxes.
        mask_crops: [K, 49] bool, the masks cropped to the boxes at 7x7; None without masks.
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    masks: Tensor | None = None
    mask_crops: Tensor | None = None


def gather_objects(batch: Batch, *, context: bool, use_masks: bool) -> Objects:
    """The objects of a batch.

    With context, every image has one dummy object, the context object, with the box of the whole image. Without
    context, each image without boxes has one dummy object with the unit box (0, 0, 1, 1). The mask of a dummy object
    contains the pixels whose centres lie in its box.
    """
    device, counts = batch.boxes.device, batch.counts
    if sum(counts) != batch.boxes.shape[0] or len(counts) != len(batch):
        raise ValueError(
            f"LGD: batch.counts must add up to the {batch.boxes.shape[0]} boxes of {len(batch)} images, "
            f"got {counts}; pass the boxes of each image"
        )
    if use_masks and batch.masks is None:
        raise ValueError("LGD: batch.masks must be given with use_masks, got None; load the data with masks")
    images = [image for image, count in enumerate(counts) if context or count == 0]  # images with a dummy object
    dummy_index = torch.tensor(images, dtype=torch.int64).to(device, non_blocking=True)
    sizes = batch.image_sizes.to(device).flip(1).float() if context else torch.ones(len(images), 2, device=device)
    objects = Objects(
        boxes=torch.cat([batch.boxes.float(), F.pad(sizes, (2, 0))]),  # (0, 0, width, height) of a dummy
        labels=torch.cat([batch.labels, torch.full_like(dummy_index, -1)]),
        image_index=torch.cat([batch.image_index, dummy_index]),
    )
    if use_masks:
        assert batch.masks is not None
        y, x = (torch.arange(length, device=device) + 0.5 for length in batch.padded_size)  # pixel centres
        dummy_masks = (y < sizes[:, 1:])[:, :, None] & (x < sizes[:, :1])[:, None, :]
        objects.masks = torch.cat([batch.masks, dummy_masks])
        objects.mask_crops = _crop_masks(objects.masks, objects.boxes)
    return objects


def _crop_masks(masks: Tensor, boxes: Tensor) -> Tensor:
    """Masks [K, H, W] cropped to boxes [K, 4]: [K, 49] bool. In small groups, as roi_align needs float masks."""
    from torchvision.ops import roi_align  # only masks need torchvision

    crops = []
    for some_masks, some_boxes in zip(masks.split(8), boxes.split(8)):
        index = torch.arange(some_boxes.shape[0], device=boxes.device, dtype=boxes.dtype)[:, None]
        rois = torch.cat([index, some_boxes], dim=1)
        crops.append(roi_align(some_masks[:, None].float(), rois, MASK_SIZE, aligned=True))
    return torch.cat(crops).flatten(1) >= 0.5


def box_descriptors(
    objects: Objects, num_classes: int, padded_size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Objects as vectors [K, 4 + num_classes (+ 49 with masks)] in [-1, 1] (methods 2.1).

    The box, clamped to [0, W - 1] x [0, H - 1] and divided by the padded size (H, W); the one-hot class; the mask crop.
    """
    height, width = padded_size
    boxes = objects.boxes.to(dtype)
    x, y = boxes[:, 0::2].clamp(0, width - 1) / width, boxes[:, 1::2].clamp(0, height - 1) / height
    one_hot = objects.labels[:, None] == torch.arange(num_classes, device=objects.labels.device)
    parts = [torch.stack([x, y], dim=2).flatten(1), one_hot]  # cat promotes bool to the dtype of the boxes
    if objects.mask_crops is not None:
        parts.append(objects.mask_crops)
    return torch.cat(parts, dim=1) * 2 - 1
