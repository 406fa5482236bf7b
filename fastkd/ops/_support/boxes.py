"""Concatenates per-image lists of boxes to the form that all ops take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops._support.checks import check_tensor


def cat_boxes(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes of all images concatenated, and the image of each.

    In torchvision the list is [target["boxes"] for target in targets], in mmdetection
    [sample.gt_instances.bboxes for sample in data_samples]. Does not synchronise with the device.

    Args:
        boxes: B tensors [K_b, 4] xyxy in pixels of the padded batch, of one dtype and device; K_b may be 0.
    Returns: boxes [K, 4] and image_index [K] int64, as `box_pool` and the other ops take them.
    Raises: ValueError or TypeError if the list is empty or a tensor is not [K_b, 4] of the first's dtype and device.
    """
    if not isinstance(boxes, (list, tuple)) or not boxes:
        raise ValueError(
            f"cat_boxes: boxes must be a list of [K_b, 4] tensors, got {boxes!r:.60}; pass one for each image"
        )
    for index, some in enumerate(boxes):
        check_tensor("cat_boxes", f"boxes[{index}]", some, "[K_b, 4]", 2)
        if some.shape[1] != 4:
            raise ValueError(f"cat_boxes: boxes[{index}] must be [K_b, 4], got {list(some.shape)}; pass xyxy boxes")
        if some.dtype != boxes[0].dtype or some.device != boxes[0].device:
            raise ValueError(
                f"cat_boxes: boxes[{index}] must be {boxes[0].dtype} on {boxes[0].device} as the first, "
                f"got {some.dtype} on {some.device}; convert them alike"
            )
    device = boxes[0].device
    owners = [torch.full((len(some),), image, dtype=torch.int64, device=device) for image, some in enumerate(boxes)]
    return torch.cat(list(boxes)), torch.cat(owners)
