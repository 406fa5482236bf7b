"""Converts a host's images and targets to a `Batch`; checks the targets and raises clear errors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.types import Batch

_warned: set[str] = set()  # kinds of warnings since the last attachment was made


def image_seeds(seed: int, step: int, images: int) -> list[int]:
    """A seed for each image of this process, independent of how a batch is split over processes."""
    first = _rank() * images
    return [(seed * 1_000_003 + step) * 65_537 + first + image for image in range(images)]


def _rank() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0


def make_batch(
    images: Tensor,
    image_sizes: Sequence[tuple[int, int]],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    num_classes: int,
    first_label: int = 0,
    masks: Sequence[Tensor] | None = None,
    seeds: Sequence[int] = (),
    check: bool = True,
) -> Batch:
    """A `Batch` of a host's images and targets.

    Boxes are clamped to their image and at least one pixel wide and high.

    Args:
        images: [B, 3, H, W] as the student got them, padded.
        image_sizes: (height, width) of each image before padding.
        boxes: B tensors [K_b, 4], xyxy in pixels of the padded batch.
        labels: B tensors [K_b], integers in [first_label, first_label + num_classes).
        num_classes: object classes, without background.
        first_label: the label of the first class (1 if 0 is the background).
        masks: B tensors [K_b, h, w] of the images before padding, or None.
        seeds: B ints, seeds of a method's random numbers.
        check: also check the values, which synchronises a GPU.
    Raises: ValueError or TypeError if lengths, shapes or labels do not fit.
    """
    if not len(image_sizes) == len(boxes) == len(labels) == images.shape[0]:
        raise ValueError(
            f"make_batch: image_sizes, boxes and labels must have one entry for each of the {images.shape[0]} images, "
            f"got {len(image_sizes)}, {len(boxes)} and {len(labels)}; pass empty tensors for images without objects"
        )
    for image, (box, label) in enumerate(zip(boxes, labels)):
        if box.dim() != 2 or box.shape[1] != 4 or label.shape != box.shape[:1]:
            raise ValueError(
                f"make_batch: boxes and labels of image {image} must be [K, 4] and [K], got {list(box.shape)} and "
                f"{list(label.shape)}; pass xyxy boxes in pixels"
            )
    device, counts = images.device, [box.shape[0] for box in boxes]
    all_boxes = torch.cat([box.detach().to(device, torch.float32) for box in boxes])
    all_labels = torch.cat([label.detach().to(device, torch.int64) for label in labels]) - first_label
    owners = [image for image, count in enumerate(counts) for _ in range(count)]
    sizes = torch.tensor([list(size) for size in image_sizes], dtype=torch.int64)
    index = torch.tensor(owners, dtype=torch.int64)
    limits = sizes.flip(1).float()[index].to(device, non_blocking=True)  # [K, 2] width, height
    if check:
        _check_values(all_boxes, all_labels, limits, num_classes, first_label)
    # Unchecked values are made harmless without synchronisation: an index out of bounds ends a process that uses CUDA.
    all_boxes, all_labels = all_boxes.nan_to_num(), all_labels.clamp(0, num_classes - 1)
    start = torch.minimum(all_boxes[:, :2].clamp(min=0), limits - 1)
    end = torch.minimum(torch.maximum(all_boxes[:, 2:], start + 1), limits)
    return Batch(
        images=images.detach(),
        image_sizes=sizes.to(device, non_blocking=True),
        boxes=torch.cat([start, end], dim=1),
        labels=all_labels,
        image_index=index.to(device, non_blocking=True),
        counts=counts,
        masks=None if masks is None else _pad_masks(masks, images),
        ignore_boxes=torch.zeros(0, 4, device=device),
        ignore_index=torch.zeros(0, dtype=torch.int64, device=device),
        image_ids=list(range(len(counts))),
        seeds=list(seeds) or list(range(len(counts))),
    )


def warn_once(kind: str, text: str) -> None:
    """Warns unless there was such a warning since `warn_again`; the text may differ from batch to batch."""
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(f"fastkd: {text}", stacklevel=4)


def warn_again() -> None:
    """Allows every warning once more, for a new run."""
    _warned.clear()


def _check_values(boxes: Tensor, labels: Tensor, limits: Tensor, num_classes: int, first_label: int) -> None:
    if not len(labels):
        return
    low, high = (int(extreme) + first_label for extreme in labels.aminmax())
    if low < first_label or high >= first_label + num_classes:
        raise ValueError(
            f"make_batch: labels must be in [{first_label}, {first_label + num_classes}) for {num_classes} classes, "
            f"got {low if low < first_label else high}; pass the num_classes of the data"
        )
    if not bool(boxes.isfinite().all()):
        raise ValueError("make_batch: boxes must be finite, got NaN or infinity; leave such boxes out")
    outside = (boxes < -1).any(1) | (boxes[:, 2:] > limits + 1).any(1) | (boxes[:, 2:] <= boxes[:, :2]).any(1)
    if bool(outside.any()):
        warn_once(
            "boxes",
            f"{int(outside.sum())} of {len(boxes)} boxes reach out of their image or are empty, for instance "
            f"{[round(side, 1) for side in boxes[outside][0].tolist()]} in (width, height) "
            f"{limits[outside][0].tolist()}; they are clamped for the distillation. Check the units and the order of "
            "the coordinates: xyxy in pixels of the transformed image",
        )


def _pad_masks(masks: Sequence[Tensor], images: Tensor) -> Tensor:
    """[K, H, W] bool over the padded batch."""
    padded = images.new_zeros(sum(len(mask) for mask in masks), *images.shape[2:], dtype=torch.bool)
    start = 0
    for mask in masks:
        padded[start : start + len(mask), : mask.shape[1], : mask.shape[2]] = mask.to(images.device) > 0
        start += len(mask)
    return padded
