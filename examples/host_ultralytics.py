"""Ultralytics' YOLO with distillation by a trainer class: python examples/host_ultralytics.py [DATA] [EPOCHS] [METHOD]

Ultralytics is licensed under AGPL-3.0.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("YOLO_OFFLINE", "true")  # no fonts, no sample data
from scenes import CLASSES, Scenes
from ultralytics import YOLO

from fastkd.integrations.ultralytics import attach


def write_yolo(root: Path) -> Path:
    """The scenes in Ultralytics' format: pictures beside text files of normalised boxes."""
    for split in ("train", "val"):
        scenes = Scenes(root, split)
        for folder in ("images", "labels"):
            (root / "yolo" / folder / split).mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(scenes.images):
            picture, target = scenes[index]
            height, width = picture.shape[1:]
            lines = []
            for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist()):
                center, size = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height), ((x2 - x1) / width, (y2 - y1) / height)
                lines.append(" ".join(map(str, (label, *center, *size))))
            name = Path(image["file_name"])
            link = root / "yolo" / "images" / split / name
            link.write_bytes((root / split / name).read_bytes())
            (root / "yolo" / "labels" / split / name.with_suffix(".txt")).write_text("\n".join(lines))
    names = "".join(f"  {label}: shape{label}\n" for label in range(CLASSES))
    content = f"path: {(root / 'yolo').resolve()}\ntrain: images/train\nval: images/val\nnames:\n{names}"
    (root / "yolo" / "data.yaml").write_text(content)
    return root / "yolo" / "data.yaml"


def main(data: str = "scenes", epochs: int = 1, method: str = "icd") -> None:
    settings = {"data": str(write_yolo(Path(data))), "epochs": epochs, "imgsz": 128, "batch": 8, "workers": 0,
                "device": "cpu", "plots": False, "amp": False, "project": str(Path(data).resolve() / "runs"),
                "exist_ok": True}  # fmt: skip
    teacher = YOLO("yolo11s.yaml")
    teacher.train(name="teacher", **settings)
    teacher = YOLO(teacher.trainer.last)
    student = YOLO("yolo11n.yaml")
    kd = attach(student, method, teacher=None if method == "lgd" else teacher, num_classes=CLASSES)
    student.train(name="student", trainer=kd.trainer, **settings)
    print(kd.report())


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]), *sys.argv[3:4])
