"""Generates a crowd data set in CrowdHuman's format."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from fastkd.data.crowd_render import CrowdStyle, render_crowd
from fastkd.data.generated import GeneratedFolder, check_counts, draw_all
from fastkd.files import write_text

GENERATOR_VERSION = 1  # to be incremented when the same arguments give different pictures
CROWD_SPLITS = ("train", "val")
STAMP = "crowd.json"
JPEG_QUALITY = 93


def _xywh(box: tuple[float, float, float, float]) -> list[float]:
    x1, y1, x2, y2 = (round(value, 2) for value in box)
    return [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]


def _draw_image(task: tuple[str, int, int, int, str, CrowdStyle]) -> dict:
    """Draw and save image `index` of a split; returns its line of the annotation file."""
    folder, seed, split, index, name, style = task
    picture, people, regions = render_crowd(np.random.default_rng([seed, split, index]), style)
    Image.fromarray(picture).save(os.path.join(folder, f"{name}.jpg"), quality=JPEG_QUALITY, subsampling=0)
    boxes = [
        {
            "tag": "person",
            "fbox": _xywh(person.full),
            "vbox": _xywh(person.visible),
            "hbox": _xywh(person.head),
            "head_attr": {"ignore": 0, "occ": 0, "unsure": 0},
            "extra": {"box_id": number, "occ": int(person.occluded)},
        }
        for number, person in enumerate(people)
    ]
    for region in regions:
        same = {key: _xywh(region) for key in ("fbox", "vbox", "hbox")}
        boxes.append({"tag": "mask", **same, "head_attr": {}, "extra": {"ignore": 1}})
    return {"ID": name, "gtboxes": boxes}


def generate_crowd(
    root: str | os.PathLike,
    *,
    train: int = 4000,
    val: int = 400,
    seed: int = 0,
    processes: int = 2,
    progress=None,
    **style,
) -> Path:
    """Write the crowd data set, unless it is there already with the same arguments.

    Files: root/Images/{train,val}-000000.jpg ..., root/annotation_{train,val}.odgt (full, visible and head boxes, and
    regions to ignore), root/crowd.json (the arguments). Image i of a split depends on (seed, split, i, style) only.

    Args:
        root: folder; new, empty, or written by this function before (then replaced when the arguments differ).
        train, val: images of each split, >= 0.
        seed: >= 0.
        processes: drawing processes, >= 1; does not affect the result.
        progress: called repeatedly as progress(done, total), or None.
        **style: difficulty, the fields of CrowdStyle (crowding, heights, throngs, noise ...).
    Returns: root as a Path.
    Raises: ValueError for bad arguments or a folder that holds something else.
    """
    check_counts("generate_crowd", train=(train, 0), val=(val, 0), seed=(seed, 0), processes=(processes, 1))
    known = {item.name for item in dataclasses.fields(CrowdStyle)}
    if set(style) - known:
        raise TypeError(f"generate_crowd: unknown arguments {sorted(set(style) - known)}; known: {sorted(known)}")
    look, root = CrowdStyle(**style), Path(root)
    parameters = {"generator": "fastkd crowd", "version": GENERATOR_VERSION, "seed": seed, "train": train, "val": val}
    parameters["style"] = dataclasses.asdict(look)
    files = [f"annotation_{split}.odgt" for split in CROWD_SPLITS]
    folder = GeneratedFolder("generate_crowd", root, STAMP, ("Images", *files), parameters)
    if folder.is_there():
        return root
    with folder.writing():
        (root / "Images").mkdir()
        jobs = {
            split: [(str(root / "Images"), seed, number, i, f"{split}-{i:06d}", look) for i in range(count)]
            for number, (split, count) in enumerate(zip(CROWD_SPLITS, (train, val), strict=True))
        }
        for split, lines in draw_all(_draw_image, jobs, processes, progress):
            text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
            write_text(root / f"annotation_{split}.odgt", text)
    return root
