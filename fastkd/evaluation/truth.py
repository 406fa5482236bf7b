"""Loads ground truth in pycocotools' format from an untrusted annotation file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd.progress import showing, track


def load_ground_truth(
    annotation_file: Path, image_ids: Sequence[int], category_ids: Sequence[int], *, masks: bool
) -> dict[int, list[dict]]:
    """The annotations of the given images and categories, as pycocotools expects them, by category id.

    Skips the annotations that data sets skip: repeated ids, boxes that are not finite, have no area or lie outside the
    image, and with `masks` objects without a valid segmentation (a crowd region then uses its box as mask). A missing
    `area` is replaced by the box's, a missing `iscrowd` by 0. Annotations get new ids from 1, because pycocotools
    treats a match with id 0 as no match.

    Raises: ValueError if masks are wanted and no annotation has one.
    """
    with showing(f"read {annotation_file.name}"), open(annotation_file, encoding="utf-8") as file:
        content = json.load(file)
    wanted = set(image_ids)
    images: dict[int, dict] = {}
    for image in content["images"]:
        if isinstance(image, dict) and image.get("id") in wanted:
            images.setdefault(image["id"], {key: image[key] for key in ("id", "width", "height")})
    kept: dict[int, list[dict[str, Any]]] = {category: [] for category in category_ids}
    seen: set[Any] = set()
    count = without = 0
    for annotation in track(content["annotations"], "check annotations", "boxes"):
        if not isinstance(annotation, dict) or annotation.get("id") in seen:
            continue
        image_id, category = annotation.get("image_id"), annotation.get("category_id")
        if image_id not in images or category not in kept:
            continue
        image = images[image_id]
        box = _valid_box(annotation.get("bbox"), image)
        if box is None:
            continue
        seen.add(annotation.get("id"))
        entry = {"image_id": image["id"], "category_id": category, "bbox": box}
        entry |= {"area": _valid_area(annotation.get("area"), box), "iscrowd": int(bool(annotation.get("iscrowd", 0)))}
        if masks:
            code = _mask_code(annotation.get("segmentation"), image)
            if code is None and not entry["iscrowd"]:
                without += 1
                continue
            entry["segmentation"] = code or _box_code(box, image)
        count += 1
        kept[category].append({"id": count, **entry})
    if without and not count:
        raise ValueError(
            f"CocoEvaluator: segmentation must be given for mask metrics, got no usable one in {annotation_file}; "
            "add masks, or evaluate a detector without masks"
        )
    return kept


def _valid_box(box: Any, image: dict) -> list[float] | None:
    """The box (xywh) as four floats; None if it is not finite, has no area or lies outside the image."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box):
        return None
    x, y, width, height = (float(value) for value in box)
    meets = x < image["width"] and y < image["height"] and x + width > 0 and y + height > 0
    return [x, y, width, height] if width > 0 and height > 0 and meets else None


def _box_code(box: list[float], image: dict) -> dict:
    """Run-length code of a box (xywh)."""
    from pycocotools import mask as mask_codec

    x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    return mask_codec.frPyObjects([[x1, y1, x2, y1, x2, y2, x1, y2]], image["height"], image["width"])[0]


def _mask_code(segmentation: Any, image: dict) -> dict | None:
    """Run-length code of an annotation's polygons or run lengths; None if they are missing or malformed."""
    from pycocotools import mask as mask_codec

    height, width = image["height"], image["width"]
    try:
        if isinstance(segmentation, dict):
            if list(segmentation["size"]) != [height, width]:
                return None
            if isinstance(segmentation["counts"], list):
                return mask_codec.frPyObjects(segmentation, height, width)
            return segmentation
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return mask_codec.merge(mask_codec.frPyObjects(polygons, height, width)) if polygons else None
    except Exception:  # pycocotools raises many types of exceptions on malformed input
        return None


def _valid_area(area: Any, box: list[float]) -> float:
    """The annotated area, which determines the object's size class; the box's area if none is given."""
    usable = isinstance(area, (int, float)) and math.isfinite(area) and area > 0
    return float(area) if usable else box[2] * box[3]
