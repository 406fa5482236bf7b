"""Cuts large images with small objects into overlapping tiles, so that objects need not be shrunk with their image."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastkd.codec import require
from fastkd.data.coco import CocoDataset
from fastkd.files import write_json
from fastkd.progress import track

THINNEST = 1.0  # pixels; a thinner visible part of a box is dropped


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Args:
        side: width and height of a tile, pixels; an image that is smaller is not enlarged.
        overlap: least overlap of neighbouring tiles, pixels.
        min_visible: least visible fraction of the area of an object; with less it is a region to ignore.
    """

    side: int = 512
    overlap: int = 128
    min_visible: float = 0.5

    def __post_init__(self) -> None:
        require(self.side >= 1, "Tiling: side", "at least 1", self.side)
        require(0 <= self.overlap < self.side, "Tiling: overlap", f"in [0, side = {self.side})", self.overlap)
        require(0 < self.min_visible <= 1, "Tiling: min_visible", "in (0, 1]", self.min_visible)

    def starts(self, length: int) -> list[int]:
        """First pixels of the tiles along a length: evenly spaced from one border to the other."""
        if length <= self.side:
            return [0]
        count = math.ceil((length - self.overlap) / (self.side - self.overlap))
        return [round(i * (length - self.side) / (count - 1)) for i in range(count)]

    def windows(self, width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
        """The tiles of an image, xyxy, row by row."""
        for y in self.starts(height):
            for x in self.starts(width):
                yield x, y, min(x + self.side, width), min(y + self.side, height)


@dataclass
class TileCounts:
    """Counts of `write_tiles`: whole images, tiles, objects in tiles, and parts of objects that are ignored."""

    images: int = 0
    tiles: int = 0
    objects: int = 0
    ignored: int = 0

    def __str__(self) -> str:
        return (
            f"{self.tiles} tiles of {self.images} images, with {self.objects} objects and {self.ignored} parts of "
            "objects to ignore"
        )


def write_tiles(
    annotation_file: str | os.PathLike,
    image_dir: str | os.PathLike,
    root: str | os.PathLike,
    split: str,
    tiling: Tiling,
    *,
    with_masks: bool = False,
) -> TileCounts:
    """Writes the tiles of a COCO data set to root/split and their annotations to root/annotations/split.json.

    An object whose visible part in a tile has at least min_visible of its area is an object there, its box cut to the
    tile; with less, its visible part is a crowd region, which training and evaluation ignore. Crowd regions stay so.

    Args:
        annotation_file, image_dir: the data set.
        root, split: where the tiles go; no files of this split may be there.
        tiling: sides and rule.
        with_masks: cut the instance masks, too; the visible area is then that of the mask.
    Raises: FileExistsError if there are files of this split; FileNotFoundError or ValueError for a bad data set.
    """
    folder, target = Path(root) / split, Path(root) / "annotations" / f"{split}.json"
    if target.exists() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"tile: root must hold no files of {split}, got some in {root}; choose another --root")
    dataset = CocoDataset(annotation_file, image_dir, with_masks=with_masks)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": n} for i, n in zip(dataset.category_ids, dataset.class_names)],
    }
    try:
        for index in track(range(len(dataset)), "cut", "images"):
            _cut(dataset, index, folder, tiling, content)
        write_json(target, content)
    except BaseException:  # an interruption, too: the command can then be given again
        shutil.rmtree(folder)
        raise
    ignored = sum(entry["iscrowd"] for entry in content["annotations"])
    objects = len(content["annotations"]) - ignored
    return TileCounts(len(dataset), len(content["images"]), objects, ignored)


def _cut(dataset: CocoDataset, index: int, folder: Path, tiling: Tiling, content: dict[str, list[dict]]) -> None:
    """Writes the tiles of one image and appends their entries to `content`."""
    pixels = dataset.read_image(index)
    width, height = (int(v) for v in dataset.sizes[index])
    boxes, labels, crowd = dataset.annotated(index)
    masks = dataset.masks(index) if dataset.with_masks else None  # of the objects that are not crowd, in their order
    rows = np.cumsum(~crowd) - 1
    suffix = ".jpg" if dataset.file_name(index).lower().endswith((".jpg", ".jpeg")) else ".png"
    for window in tiling.windows(width, height):
        x, y, right, bottom = window
        name = f"{dataset.image_ids[index]}_{x}_{y}{suffix}"
        Image.fromarray(pixels[y:bottom, x:right]).save(folder / name, quality=95)
        image_id = len(content["images"]) + 1
        content["images"].append({"id": image_id, "file_name": name, "width": right - x, "height": bottom - y})
        for box, label, is_crowd, row in zip(boxes, labels, crowd, rows):
            mask = None if masks is None or is_crowd else masks[row]
            entry = _visible_part(box, mask, window, dataset.with_masks)
            if entry is None:
                continue
            ignored = bool(is_crowd) or entry.pop("visible") < tiling.min_visible
            entry.pop("visible", None)
            entry |= {"id": len(content["annotations"]) + 1, "image_id": image_id, "iscrowd": int(ignored)}
            content["annotations"].append(entry | {"category_id": dataset.category_ids[int(label)]})


def _visible_part(
    box: np.ndarray, mask: np.ndarray | None, window: tuple[int, int, int, int], with_masks: bool
) -> dict[str, Any] | None:
    """Box, area and segmentation of a box's part inside a window, and the visible fraction; None if it is too thin."""
    x, y, right, bottom = window
    cut = np.maximum(box, (x, y, x, y)).clip(max=(right, bottom, right, bottom)).astype(np.float64) - (x, y, x, y)
    size = cut[2:] - cut[:2]
    if size.min() < min(THINNEST, *(box[2:] - box[:2])):
        return None
    part, whole = float(size.prod()), float((box[2:] - box[:2]).astype(np.float64).prod())
    entry: dict[str, Any] = {"bbox": [*cut[:2].tolist(), *size.tolist()]}
    if with_masks:
        if mask is None:  # a crowd region, kept as its box
            crop: np.ndarray = np.zeros((bottom - y, right - x), bool)
            left, top, end, low = (round(v) for v in cut)
            crop[top:low, left:end] = True
        else:
            crop, whole = mask[y:bottom, x:right], float(mask.sum())
            part = float(crop.sum())
            if part == 0:
                return None
        entry["segmentation"] = _run_lengths(crop)
    return entry | {"area": part, "visible": part / whole}


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask [H, W] as COCO's uncompressed run lengths: column by column, beginning with a run of zeros."""
    flat = mask.ravel(order="F")
    edges: np.ndarray = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[:1].any() else runs}
