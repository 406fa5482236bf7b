"""Reading a COCO annotation file into flat arrays, with every entry checked.

Faults of the whole file (not JSON, no categories, wrong types of the lists) raise. A single bad image or box is
skipped, counted and logged, or raises with strict.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastkd.data.images import MAX_PIXELS, ImageFolder
from fastkd.data.segmentation import Segmentations, SegmentationWriter
from fastkd.progress import showing, track

log = logging.getLogger("fastkd.data")

SHOWN = 3  # examples logged for each reason
MIN_SIDE = 0.01  # pixels; box encodings take the logarithm of a box's size inside the image
OUTSIDE = "box outside the image"


class Problems:
    """Counts skipped entries by reason; with strict, raises instead.

    Args:
        source: file name for messages.
        strict: raise ValueError at the first problem.
        caller: class name for messages.
    """

    def __init__(self, source: str, strict: bool, caller: str = "CocoDataset"):
        self.source = source
        self.caller = caller
        self.strict = strict
        self.counts: Counter[str] = Counter()

    def report(self, reason: str, what: str) -> None:
        """Reports one problem; `what` describes it, with the id of the image or annotation."""
        message = f"{self.caller}: {self.source}: {what}"
        if self.strict:
            raise ValueError(f"{message}; correct the file, or pass strict=False to leave it out")
        self.counts[reason] += 1
        if self.counts[reason] <= SHOWN:
            log.warning("%s; left out", message)

    def summary(self) -> str:
        return ", ".join(f"{count} x {reason}" for reason, count in sorted(self.counts.items()))


class BadEntry(ValueError):
    """A bad entry. Args: reason: short, for counting; explanation: for the message."""

    def __init__(self, reason: str, explanation: str):
        super().__init__(explanation)
        self.reason = reason


@dataclass
class AnnotationArrays:
    """A checked annotation file. n images, K boxes ordered by image, in the order of the file within an image.

    category_ids [C] and class_names [C] by label; image_ids [n] int64; sizes [n, 2] int32 (width, height); name_bytes
    uint8 and name_ends [n + 1] int64 (file names, UTF-8); starts [n + 1] int64 into the boxes; boxes [K, 4] float32
    xyxy clipped to the image; labels [K] int32; crowd [K] bool; annotation_ids [K] int64; sha256 of the file.
    """

    category_ids: list[int]
    class_names: list[str]
    image_ids: np.ndarray
    sizes: np.ndarray
    name_bytes: np.ndarray
    name_ends: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    annotation_ids: np.ndarray
    segmentations: Segmentations | None
    clipped: int
    sha256: str | None = None

    def keep_images(self, rows: np.ndarray) -> AnnotationArrays:
        """A copy with only these images; `rows` ascending."""
        counts = np.diff(self.starts)[rows]
        boxes = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in rows] or [np.zeros(0, np.int64)])
        names = [self.name_bytes[self.name_ends[i] : self.name_ends[i + 1]] for i in rows]
        return AnnotationArrays(
            self.category_ids,
            self.class_names,
            self.image_ids[rows],
            self.sizes[rows],
            np.concatenate(names) if names else self.name_bytes[:0],
            np.concatenate([[0], np.cumsum([len(name) for name in names], dtype=np.int64)]).astype(np.int64),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            self.boxes[boxes],
            self.labels[boxes],
            self.crowd[boxes],
            self.annotation_ids[boxes],
            None if self.segmentations is None else self.segmentations.take(boxes),
            self.clipped,
            self.sha256,
        )


def _load_json(path: str) -> tuple[dict, str]:
    """Content and SHA-256 of a COCO file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"CocoDataset: annotation_file must be an existing file, got {path!r}; "
            "`fastkd data scenes` writes the embedded data set"
        )
    try:
        with open(path, "rb") as file:
            text = file.read()
        content, digest = json.loads(text), hashlib.sha256(text).hexdigest()
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"CocoDataset: annotation_file must be a COCO JSON file, got {path!r} which is not JSON "
            f"({type(error).__name__}: {error}); it may be truncated"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"CocoDataset: {path}: the file must hold an object, got a {type(content).__name__}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            found = f"a {type(content[key]).__name__}" if key in content else "nothing"
            raise ValueError(f"CocoDataset: {path}: {key!r} must be a list, got {found}; see the COCO data format")
    return content, digest


def _is_id(value) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63  # excludes bool


def _read_categories(path: str, categories: list) -> tuple[list[int], list[str]]:
    """Ids and names in ascending order of the ids; the label of a class is its index in this order."""
    names: dict[int, str] = {}
    for place, item in enumerate(categories):
        if not isinstance(item, dict) or not _is_id(item.get("id")) or not isinstance(item.get("name"), str):
            raise ValueError(
                f"CocoDataset: {path}: category number {place} must have an integer 'id' and a text 'name', "
                f"got {item!r:.80}"
            )
        if item["id"] in names:
            raise ValueError(f"CocoDataset: {path}: category id {item['id']} must be unique, got it twice")
        names[item["id"]] = item["name"]
    if not names:
        raise ValueError(f"CocoDataset: {path}: 'categories' must name at least one class, got none")
    ids = sorted(names)
    return ids, [names[i] for i in ids]


def read_class_names(path: str | os.PathLike) -> list[str]:
    """The class names of a COCO annotation file, in label order. Raises: FileNotFoundError, ValueError."""
    path = os.fspath(path)
    return _read_categories(path, _load_json(path)[0]["categories"])[1]


def _check_image(item, known: dict, folder: ImageFolder, max_pixels: int) -> None:
    if not isinstance(item, dict) or not _is_id(item.get("id")):
        raise BadEntry("malformed image entry", f"it must be an object with an integer 'id', got {item!r:.80}")
    if item["id"] in known:
        raise BadEntry("duplicate image id", "its id must be unique, got it twice")
    width, height, name = item.get("width"), item.get("height"), item.get("file_name")
    if not isinstance(name, str):
        raise BadEntry("malformed image entry", f"file_name must be text, got {name!r:.80}")
    if type(width) is not int or type(height) is not int or width < 1 or height < 1:
        raise BadEntry(
            "malformed image entry", f"width and height must be integers >= 1, got {width!r:.9}, {height!r:.9}"
        )
    if width * height > max_pixels:
        raise BadEntry("image too large", f"{width} x {height} pixels are more than the limit of {max_pixels}")
    problem = folder.problem(name)
    if problem:
        raise BadEntry(problem[0], f"file_name {name!r:.200}: {problem[1]}")


def _read_images(items: list, folder: ImageFolder, max_pixels: int, problems: Problems):
    """Usable images: {id: index}, (width, height) and names as flat arrays; ids of the skipped images."""
    known: dict[int, int] = {}
    left_out: set[int] = set()
    sizes, name_ends, name_bytes = array("i"), array("q", [0]), bytearray()
    for place, item in enumerate(track(items, "check annotations", "images")):
        try:
            _check_image(item, known, folder, max_pixels)
        except BadEntry as bad:
            has_id = isinstance(item, dict) and _is_id(item.get("id"))
            if has_id and item["id"] not in known:
                left_out.add(item["id"])
            which = item["id"] if has_id else f"number {place}"
            problems.report(bad.reason, f"image {which}: {bad}")
            continue
        known[item["id"]] = len(known)
        sizes.extend((item["width"], item["height"]))
        name_bytes += item["file_name"].encode("utf-8", "surrogatepass")
        name_ends.append(len(name_bytes))
    size_array = np.array(sizes, np.int32).reshape(-1, 2)
    return known, left_out, size_array, np.frombuffer(bytes(name_bytes), np.uint8), np.array(name_ends, np.int64)


def check_box(
    bbox, width: int, height: int, name: str = "bbox"
) -> tuple[tuple[float, float, float, float], tuple[float, float, float, float], bool]:
    """A box [x, y, width, height] as xyxy, the box clipped to the image, and whether clipping moved it over a pixel.

    Args:
        bbox: the JSON value.
        width, height: size of the image, pixels.
        name: key of the box in the file, for messages.
    Raises: BadEntry.
    """
    if not isinstance(bbox, list) or len(bbox) != 4 or any(type(v) not in (int, float) for v in bbox):
        raise BadEntry("malformed box", f"{name} must be 4 numbers [x, y, width, height], got {bbox!r:.80}")
    try:
        x, y, w, h = (float(v) for v in bbox)
    except OverflowError:
        raise BadEntry("box not finite", f"{name} must be finite, got {bbox!r:.80}") from None
    if not all(map(math.isfinite, (x, y, w, h))):
        raise BadEntry("box not finite", f"{name} must be finite, got {bbox}")
    if w < MIN_SIDE or h < MIN_SIDE:
        raise BadEntry("box of no size", f"{name} must be at least {MIN_SIDE} pixels wide and high, got {bbox}")
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if x2 - x1 < MIN_SIDE or y2 - y1 < MIN_SIDE:
        raise BadEntry(OUTSIDE, f"{name} must overlap the image of {width} x {height} pixels, got {bbox}")
    moved = x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1
    return (x, y, x + w, y + h), (x1, y1, x2, y2), moved


class _BoxReader:
    """Checks annotations one by one and collects them as flat arrays."""

    def __init__(self, images: dict[int, int], left_out: set[int], sizes: np.ndarray, category_ids: list[int], masks):
        self.images, self.left_out, self.sizes = images, left_out, sizes.tolist()
        self.labels_of = {category: label for label, category in enumerate(category_ids)}
        self.seen: set[int] = set()
        self.owner, self.labels, self.crowd, self.ids = array("q"), array("i"), array("b"), array("q")
        self.boxes = array("f")
        self.masks = SegmentationWriter() if masks else None
        self.clipped = 0

    def add(self, item) -> None:
        """Appends one annotation. Raises: BadEntry, before anything is appended."""
        if not isinstance(item, dict) or not _is_id(item.get("id")):
            raise BadEntry("malformed annotation", f"it must be an object with an integer 'id', got {item!r:.80}")
        if item["id"] in self.seen:
            raise BadEntry("duplicate annotation id", "its id must be unique, got it twice")
        image_id, category, crowd = item.get("image_id"), item.get("category_id"), item.get("iscrowd", 0)
        if type(image_id) is not int or image_id not in self.images:
            if type(image_id) is int and image_id in self.left_out:
                raise BadEntry("box of an image left out", f"image {image_id} was left out")
            raise BadEntry("unknown image id", f"image_id must be an image of the file, got {image_id!r:.40}")
        if type(category) is not int or category not in self.labels_of:
            raise BadEntry("unknown category id", f"category_id must be a category of the file, got {category!r:.40}")
        if type(crowd) not in (int, bool) or crowd not in (0, 1):
            raise BadEntry("malformed annotation", f"iscrowd must be 0 or 1, got {crowd!r:.40}")
        index = self.images[image_id]
        width, height = self.sizes[index]
        _, box, moved = check_box(item.get("bbox"), width, height)
        mask = _check_mask(self.masks, item, crowd, width, height) if self.masks is not None else None
        self.seen.add(item["id"])
        self.clipped += moved
        self.boxes.extend(box)
        self.owner.append(index)
        self.labels.append(self.labels_of[category])
        self.crowd.append(int(crowd))
        self.ids.append(item["id"])
        if self.masks is not None:
            self.masks.add(mask)


def _check_mask(masks: SegmentationWriter, item: dict, crowd: bool, width: int, height: int) -> Any:
    segmentation = item.get("segmentation")
    if crowd and not segmentation:
        return None  # regions to ignore need no mask
    try:
        return masks.check(segmentation, height, width)
    except ValueError as error:
        raise BadEntry("bad segmentation", f"segmentation: {error}") from None


def read_annotations(
    path: str, folder: ImageFolder, *, strict: bool, with_masks: bool, max_pixels: int = MAX_PIXELS
) -> tuple[AnnotationArrays, Problems]:
    """Read and check a COCO annotation file.

    Args:
        path: the JSON file.
        folder: folder of its images.
        strict: raise on a bad image or box instead of skipping it.
        with_masks: read segmentations; an object without a valid one is then bad.
        max_pixels: larger images are bad.
    Returns: the arrays, and the counts of skipped entries.
    Raises: FileNotFoundError, ValueError.
    """
    with showing(f"read {os.path.basename(path)}"):
        content, digest = _load_json(path)
    category_ids, class_names = _read_categories(path, content["categories"])
    problems = Problems(path, strict)
    images, left_out, sizes, name_bytes, name_ends = _read_images(content["images"], folder, max_pixels, problems)
    if not images:
        found = f"{len(content['images'])} images, left out: {problems.summary()}" if content["images"] else "no image"
        raise ValueError(f"CocoDataset: {path}: the file must list at least one usable image, got {found}")
    reader = _BoxReader(images, left_out, sizes, category_ids, with_masks)
    for place, item in enumerate(track(content["annotations"], "check annotations", "boxes")):
        try:
            reader.add(item)
        except BadEntry as bad:
            has_id = isinstance(item, dict) and _is_id(item.get("id"))
            which = item["id"] if has_id else f"number {place}"
            problems.report(bad.reason, f"annotation {which}: {bad}")
    if content["annotations"] and not reader.ids:
        raise ValueError(
            f"CocoDataset: {path}: at least one annotation must be usable, got {len(content['annotations'])} of which "
            f"all were left out: {problems.summary()}; are image_dir and the file of the same data set?"
        )
    del content
    owner = np.array(reader.owner, np.int64)
    order = np.argsort(owner, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(images)))]).astype(np.int64)
    arrays = AnnotationArrays(
        category_ids,
        class_names,
        np.fromiter(images, np.int64, len(images)),
        sizes,
        name_bytes,
        name_ends,
        starts,
        np.array(reader.boxes, np.float32).reshape(-1, 4)[order],
        np.array(reader.labels, np.int32)[order],
        np.array(reader.crowd, bool)[order],
        np.array(reader.ids, np.int64)[order],
        reader.masks.finish().take(order) if reader.masks is not None else None,
        reader.clipped,
        digest,
    )
    return arrays, problems
