"""Loads ground truth in pycocotools' format from an untrusted annotation file."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd.masks import check_polygons, pack_runs
from fastkd.progress import showing, track


def load_ground_truth(
    annotation_file: Path,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    *,
    masks: bool,
    sha256: str | None = None,
) -> dict[int, list[dict]]:
    """The annotations of the given images and categories, as pycocotools expects them, by category id.

    Skips the annotations that data sets skip: repeated ids, boxes that are not finite, have no area or lie outside the
    image, and with `masks` objects without a valid segmentation (a crowd region then uses its box as mask). A missing
    `area` is replaced by the box's, a missing `iscrowd` by 0. Annotations get new ids from 1, because pycocotools
    treats a match with id 0 as no match.

    Args:
        sha256: of the file when the data set was opened; None does not check it.
    Raises: ValueError if masks are wanted and no annotation has one, or if the file changed.
    """
    with showing(f"read {annotation_file.name}"):
        text = annotation_file.read_bytes()
        if sha256 is not None and hashlib.sha256(text).hexdigest() != sha256:
            raise ValueError(
                f"CocoEvaluator: annotation_file must be as it was when the data set was opened, got {annotation_file} "
                "with another content; restore it, and resume if this was a training run"
            )
        content = json.loads(text)
        del text
    wanted = set(image_ids)
    images: dict[int, dict] = {}
    for image in content["images"]:
        if isinstance(image, dict) and _is_size(image) and type(image.get("id")) is int and image["id"] in wanted:
            images.setdefault(image["id"], {key: image[key] for key in ("id", "width", "height")})
    kept: dict[int, list[dict[str, Any]]] = {category: [] for category in category_ids}
    seen: set[Any] = set()
    count = without = 0
    for annotation in track(content["annotations"], "check annotations", "boxes"):
        if not isinstance(annotation, dict):
            continue
        number, image_id, category = (annotation.get(key) for key in ("id", "image_id", "category_id"))
        if not type(number) is type(image_id) is type(category) is int or number in seen:
            continue
        if image_id not in images or category not in kept or annotation.get("iscrowd", 0) not in (0, 1):
            continue
        image = images[image_id]
        box = _valid_box(annotation.get("bbox"), image)
        if box is None:
            continue
        seen.add(number)
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
    if not all(map(_is_number, box)):
        return None
    x, y, width, height = (float(value) for value in box)
    meets = x < image["width"] and y < image["height"] and x + width > 0 and y + height > 0
    return [x, y, width, height] if width > 0 and height > 0 and meets else None


def _box_code(box: list[float], image: dict) -> dict:
    """Run-length code of a box (xywh), clipped to the image: pycocotools needs memory proportional to its length."""
    from pycocotools import mask as mask_codec

    x1, y1 = max(box[0], 0.0), max(box[1], 0.0)
    x2, y2 = min(box[0] + box[2], float(image["width"])), min(box[1] + box[3], float(image["height"]))
    return mask_codec.frPyObjects([[x1, y1, x2, y1, x2, y2, x1, y2]], image["height"], image["width"])[0]


def _mask_code(segmentation: Any, image: dict) -> dict | None:
    """Run-length code of an annotation's polygons or run lengths; None if they are missing or malformed."""
    from pycocotools import mask as mask_codec

    height, width = image["height"], image["width"]
    try:
        if isinstance(segmentation, dict):
            return {"size": [height, width], "counts": pack_runs(segmentation, height, width)}
        polygons = check_polygons(segmentation, height, width)
    except (ValueError, TypeError):
        return None
    return mask_codec.merge(mask_codec.frPyObjects([points.tolist() for points in polygons], height, width))


def _valid_area(area: Any, box: list[float]) -> float:
    """The annotated area, which determines the object's size class; the box's area if none is given."""
    return float(area) if _is_number(area) and area > 0 else box[2] * box[3]


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can represent; math.isfinite raises for integers beyond that."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_size(image: dict) -> bool:
    return all(type(image.get(side)) is int and image[side] >= 1 for side in ("width", "height"))
