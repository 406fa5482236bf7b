"""Small COCO folders made by hand, for the tests of the data package."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 17, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "toothbrush"}]
# a 10 x 8 image with two objects and a crowd, a 12 x 6 one without, an 8 x 8 one with one object
CONTENT = {
    "images": [
        {"id": 5, "file_name": "a.png", "width": 10, "height": 8},
        {"id": 2, "file_name": "sub/b.png", "width": 12, "height": 6},
        {"id": 9, "file_name": "c.png", "width": 8, "height": 8},
    ],
    "annotations": [
        {"id": 11, "image_id": 9, "category_id": 3, "bbox": [1, 2, 4, 3], "area": 12, "iscrowd": 0,
         "segmentation": [[1, 2, 5, 2, 5, 5, 1, 5]]},
        {"id": 12, "image_id": 5, "category_id": 90, "bbox": [0, 0, 5, 4], "area": 20, "iscrowd": 0,
         "segmentation": [[0, 0, 5, 0, 5, 4, 0, 4]]},
        {"id": 13, "image_id": 5, "category_id": 3, "bbox": [2, 3, 6, 4], "area": 24, "iscrowd": 1,
         "segmentation": {"size": [8, 10], "counts": [80]}},
        {"id": 14, "image_id": 5, "category_id": 17, "bbox": [6, 1, 3, 5], "area": 15, "iscrowd": 0,
         "segmentation": {"size": [8, 10], "counts": [49, 5, 3, 5, 3, 5, 10]}},
    ],
    "categories": CATEGORIES,
}  # fmt: skip


def content() -> dict:
    """A copy to change."""
    return copy.deepcopy(CONTENT)


def write_folder(root: Path, coco: dict | None = None, seed: int = 0) -> tuple[Path, Path]:
    """Write the annotation file and noise images for it: (annotation file, image folder)."""
    coco = content() if coco is None else coco
    images = root / "images"
    rng = np.random.default_rng(seed)
    for item in coco["images"]:
        path = images / item["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (item["height"], item["width"], 3), dtype=np.uint8)).save(path)
    file = root / "annotations.json"
    file.write_text(json.dumps(coco))
    return file, images


def many_images(count: int, seed: int = 0, classes: int = 3) -> dict:
    """COCO content of `count` images of varied shapes with 0 to 4 boxes each."""
    rng = np.random.default_rng(seed)
    shapes = [(32, 32), (48, 24), (24, 48)]
    images, annotations = [], []
    for i in range(count):
        width, height = shapes[int(rng.integers(3))]
        images.append({"id": 100 + 3 * i, "file_name": f"{i}.png", "width": width, "height": height})
        for _ in range(int(rng.integers(5))):
            x, y = int(rng.integers(width - 8)), int(rng.integers(height - 8))
            w, h = int(rng.integers(4, width - x + 1)), int(rng.integers(4, height - y + 1))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + 3 * i,
                    "category_id": int(rng.integers(classes)) * 7,
                    "bbox": [x, y, w, h],
                    "iscrowd": int(rng.random() < 0.1),
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    categories = [{"id": 7 * c, "name": f"class {c}"} for c in range(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}
