"""Scenes in each host's data format, and AP of a host's predictions."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.io import decode_image

from benchmarks.hosts.plan import SIDE, START_CLASSES
from fastkd.data import generate_scenes


class Scenes(torch.utils.data.Dataset):
    """Images in [0, 1] and {"boxes": xyxy, "labels": from first_label} of a split.

    Args:
        root: folder of `generate`.
        split: "train" or "val".
        first_label: the label of the first class.
    """

    def __init__(self, root: Path, split: str, *, first_label: int = 0):
        content = json.loads((root / "annotations" / f"{split}.json").read_text())
        self.folder, self.images, self.first_label = root / split, content["images"], first_label
        self.categories = [category["id"] for category in content["categories"]]
        self.objects: dict[int, list[tuple[list[float], int]]] = {image["id"]: [] for image in self.images}
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            box = [x, y, x + width, y + height]
            self.objects[annotation["image_id"]].append((box, self.categories.index(annotation["category_id"])))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        entry = self.images[index]
        objects = self.objects[entry["id"]]
        boxes = torch.tensor([box for box, _ in objects]).reshape(-1, 4)
        labels = torch.tensor([label for _, label in objects], dtype=torch.int64) + self.first_label
        return decode_image(self.folder / entry["file_name"]) / 255, {"boxes": boxes, "labels": labels}


def generate(root: Path, train: int, val: int) -> Path:
    """Square scenes of 128 pixels."""
    return generate_scenes(root, train=train, val=val, sizes=((SIDE, SIDE),))


def generate_other(root: Path, train: int, val: int) -> Path:
    """Other scenes, whose classes are those of `generate` two by two, for pretraining."""
    if not (root / "other").exists():
        generate_scenes(root, train=train, val=val, seed=1, sizes=((SIDE, SIDE),))
        for split in ("train", "val"):
            path = root / "annotations" / f"{split}.json"
            content = json.loads(path.read_text())
            ids = [category["id"] for category in content["categories"]]
            content["categories"] = content["categories"][:START_CLASSES]
            for annotation in content["annotations"]:
                annotation["category_id"] = ids[ids.index(annotation["category_id"]) % START_CLASSES]
            path.write_text(json.dumps(content))
        (root / "other").touch()
    return root


def write_yolo(root: Path) -> Path:
    """The scenes in Ultralytics' format; returns data.yaml."""
    target = root / "yolo"
    for split in ("train", "val"):
        scenes = Scenes(root, split)
        (target / "images").mkdir(parents=True, exist_ok=True)
        (target / "labels" / split).mkdir(parents=True, exist_ok=True)
        if not (target / "images" / split).exists():
            shutil.copytree(root / split, target / "images" / split)
        for entry in scenes.images:
            lines = []
            for (x1, y1, x2, y2), label in scenes.objects[entry["id"]]:
                box = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
                lines.append(" ".join([str(label), *(f"{side / SIDE:.6f}" for side in box)]))
            name = Path(entry["file_name"]).with_suffix(".txt")
            (target / "labels" / split / name).write_text("\n".join(lines))
    names = "".join(f"  {label}: shape{label}\n" for label in range(len(scenes.categories)))
    content = f"path: {target.resolve()}\ntrain: images/train\nval: images/val\nnames:\n{names}"
    (target / "data.yaml").write_text(content)
    return target / "data.yaml"


def average_precision(root: Path, found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """AP and AP50 by pycocotools of (boxes xyxy, labels from 0, scores) of each validation image, in order."""
    scenes, rows = Scenes(root, "val"), []
    for entry, (boxes, labels, scores) in zip(scenes.images, found, strict=True):
        for (x1, y1, x2, y2), label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist()):
            if label < len(scenes.categories):
                row = {"image_id": entry["id"], "category_id": scenes.categories[int(label)], "score": score}
                rows.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    if not rows:
        return {"AP": 0.0, "AP50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / "annotations" / "val.json"))
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"AP": 100 * float(evaluation.stats[0]), "AP50": 100 * float(evaluation.stats[1])}
