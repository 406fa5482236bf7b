"""Generated pictures with boxes for the examples: images in [0, 1] and targets in torchvision's format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import decode_image

from fastkd.data import generate_scenes

CLASSES = 10


class Scenes(torch.utils.data.Dataset):
    """Pictures of 128 pixels with up to nine shapes of ten classes, written once to `root`.

    Args:
        root: folder of the pictures.
        split: "train" or "val".
        train, val: pictures of each split.
        first_label: the label of the first class (1 where 0 is the background).
    """

    def __init__(self, root: str | Path, split: str = "train", *, train: int = 64, val: int = 16, first_label: int = 0):
        root = generate_scenes(root, train=train, val=val, sizes=((128, 128),), processes=1)
        self.folder, self.first_label = Path(root) / split, first_label
        content = json.loads((Path(root) / "annotations" / f"{split}.json").read_text())
        number = {category["id"]: index for index, category in enumerate(content["categories"])}
        self.images = content["images"]
        self.objects: dict[int, list[tuple[list[float], int]]] = {image["id"]: [] for image in self.images}
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            entry = [x, y, x + width, y + height], number[annotation["category_id"]]
            self.objects[annotation["image_id"]].append(entry)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.images[index]
        objects = self.objects[image["id"]]
        boxes = torch.tensor([box for box, _ in objects]).reshape(-1, 4)
        labels = torch.tensor([label for _, label in objects], dtype=torch.int64) + self.first_label
        return decode_image(self.folder / image["file_name"]) / 255, {"boxes": boxes, "labels": labels}


def collate(items: list) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images and targets as lists."""
    images, targets = zip(*items)
    return list(images), list(targets)


def loader(root: str | Path, **options) -> torch.utils.data.DataLoader:
    """Batches of four training pictures, shuffled."""
    return torch.utils.data.DataLoader(Scenes(root, **options), 4, shuffle=True, collate_fn=collate)
