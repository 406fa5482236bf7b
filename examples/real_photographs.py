"""A first data set of real photographs: 364 microscope images of blood cells, in COCO format for the custom recipes.

    git clone https://github.com/Shenggan/BCCD_Dataset        (MIT licence, 7 MB)
    python examples/real_photographs.py BCCD_Dataset data/bccd
    fastkd train custom-retinanet-baseline --data.root data/bccd

The annotations there are Pascal VOC's XML, one file per image. This reads them into COCO JSON, the images of the lists
"trainval" for training and those of "test" for validation. See docs/custom-data.md.
"""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

CLASSES = ("RBC", "WBC", "Platelets")
SPLITS = {"train": "trainval", "val": "test"}  # ours -> the list's name


def read_objects(path: Path) -> tuple[tuple[int, int], list[tuple[str, list[float]]]]:
    """Width and height, and (class, xywh box) of each object; VOC counts pixels from 1 and includes the last one."""
    root = ElementTree.parse(path).getroot()
    size = int(root.findtext("size/width", "0")), int(root.findtext("size/height", "0"))
    objects = []
    for item in root.iter("object"):
        corners = [float(item.findtext(f"bndbox/{name}", "nan")) for name in ("xmin", "ymin", "xmax", "ymax")]
        x1, y1, x2, y2 = corners
        objects.append((item.findtext("name", ""), [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]))
    return size, objects


def convert(source: Path, target: Path, split: str) -> dict:
    """Copies the images of a split and writes its annotations; returns their content."""
    content: dict = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)],
    }
    (target / split).mkdir(parents=True)
    for name in (source / "ImageSets/Main" / f"{SPLITS[split]}.txt").read_text().split():
        (width, height), objects = read_objects(source / "Annotations" / f"{name}.xml")
        image = {"id": len(content["images"]) + 1, "file_name": f"{name}.jpg", "width": width, "height": height}
        content["images"].append(image)
        shutil.copyfile(source / "JPEGImages" / f"{name}.jpg", target / split / f"{name}.jpg")
        for class_name, box in objects:
            entry = {"id": len(content["annotations"]) + 1, "image_id": image["id"], "bbox": box, "iscrowd": 0}
            entry |= {"category_id": CLASSES.index(class_name) + 1, "area": box[2] * box[3]}
            content["annotations"].append(entry)
    (target / "annotations").mkdir(exist_ok=True)
    (target / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return content


def main(source: Path, target: Path) -> None:
    """Converts both splits."""
    voc = source / "BCCD"
    if not (voc / "ImageSets/Main").is_dir():
        raise SystemExit(
            f"real_photographs: SOURCE must be a clone of BCCD_Dataset, got {source} without BCCD/ImageSets/Main; "
            "git clone https://github.com/Shenggan/BCCD_Dataset"
        )
    if target.exists():
        raise SystemExit(f"real_photographs: TARGET must be new, got {target}, which exists; remove it or name another")
    for split in SPLITS:
        content = convert(voc, target, split)
        print(f"{split}: {len(content['images'])} images, {len(content['annotations'])} objects")
    print(f"next: fastkd train custom-retinanet-baseline --data.root {target}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python examples/real_photographs.py BCCD_Dataset TARGET")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
