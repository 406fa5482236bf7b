"""Private memory of a data loader worker after one pass through a data set.

    python benchmarks/data_memory.py                     # a million boxes
    python benchmarks/data_memory.py --boxes 200000 --json

A worker starts as a fork and shares the pages of its parent until it writes to them. Python writes a reference count to
every object it accesses, so a data set stored as objects is gradually copied into each worker; CocoDataset stores
arrays. Measured: private pages (Private_Clean + Private_Dirty of /proc/<pid>/smaps_rollup) of a worker after one pass,
minus those after its first batch. Both variants read the same annotation file; "objects" keeps the result of json.load.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastkd.data import CocoDataset, build_train_loader

IMAGES = 400
SIDE = 64
BATCH = 4


def write_data(root: Path, boxes: int) -> tuple[Path, Path]:
    """Write IMAGES small grey images with `boxes` boxes in total."""
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (SIDE, SIDE), (90, 90, 90)).save(root / "images" / "grey.png")
    images = [{"id": i, "file_name": "grey.png", "width": SIDE, "height": SIDE} for i in range(IMAGES)]
    corners = np.random.default_rng(0).integers(1, SIDE // 2, (boxes, 4)).tolist()
    annotations = [
        {"id": k, "image_id": k % IMAGES, "category_id": k % 80, "bbox": [x + 0.5, y + 0.5, w, h], "iscrowd": 0}
        for k, (x, y, w, h) in enumerate(corners)
    ]
    categories = [{"id": c, "name": f"class {c}"} for c in range(80)]
    file = root / "annotations.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file, root / "images"


class Objects(Dataset):
    """The usual way: a list of dictionaries for each image."""

    def __init__(self, file: Path):
        self.by_image: list[list[dict]] = [[] for _ in range(IMAGES)]
        for item in json.loads(file.read_text())["annotations"]:
            self.by_image[item["image_id"]].append(item)

    def __len__(self) -> int:
        return IMAGES // BATCH

    def __getitem__(self, step: int) -> np.ndarray:
        items = [item for image in self.by_image[step * BATCH : (step + 1) * BATCH] for item in image]
        return np.array([item["bbox"] for item in items], np.float32).sum(0)


def private_megabytes() -> float:
    """Largest private memory of the children of this process."""
    found = []
    for child in multiprocessing.active_children():
        lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
        found.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024)
    return max(found)


def growth(batches) -> float:
    """Megabytes between the first batch and the last."""
    measured = [private_megabytes() for step, _ in enumerate(batches) if step in (0, len(batches) - 1)]
    return measured[1] - measured[0]


def measure(boxes: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file, images = write_data(Path(folder), boxes)
        data = CocoDataset(file, images, strict=True)
        loader = build_train_loader(data, batch_size=BATCH, total_steps=IMAGES // BATCH, workers=1)
        row = {"boxes": boxes, "held as": "arrays", "data set, MB": round(data.nbytes / 2**20, 1)}
        rows.append({**row, "growth of a worker, MB": round(growth(loader), 1)})
        objects = Objects(file)
        loader = DataLoader(objects, batch_size=None, num_workers=1, multiprocessing_context="fork")
        row = {"boxes": boxes, "held as": "objects", "data set, MB": None}
        rows.append({**row, "growth of a worker, MB": round(growth(loader), 1)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxes", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args()
    rows = measure(1_000) + measure(arguments.boxes)
    if arguments.json:
        print(json.dumps(rows))
        return
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join("" if v is None else str(v) for v in row.values()) + " |")


if __name__ == "__main__":
    main()
