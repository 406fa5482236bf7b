"""Opens a data set by the name of its format."""

from __future__ import annotations

import os

from fastkd.data.coco import CocoDataset, DetectionDataset
from fastkd.data.crowdhuman import CrowdHumanDataset

FORMATS = ("coco", "crowdhuman")


def open_dataset(
    format: str,
    annotation_file: str | os.PathLike,
    image_dir: str | os.PathLike,
    *,
    strict: bool = False,
    with_masks: bool = False,
    crowd_boxes: str = "full",
) -> DetectionDataset:
    """The data set of an annotation file.

    Args:
        format: "coco" or "crowdhuman".
        annotation_file, image_dir, strict: see CocoDataset and CrowdHumanDataset.
        with_masks: read instance masks (coco only).
        crowd_boxes: "full", "visible" or "head" boxes (crowdhuman only).
    Raises: ValueError for an unknown format or for masks with crowdhuman; the exceptions of the data set.
    """
    if format not in FORMATS:
        raise ValueError(f"open_dataset: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "coco":
        return CocoDataset(annotation_file, image_dir, strict=strict, with_masks=with_masks)
    if with_masks:
        raise ValueError("open_dataset: with_masks must be False for crowdhuman, which has no masks, got True")
    return CrowdHumanDataset(annotation_file, image_dir, boxes=crowd_boxes, strict=strict)
