"""Scenes: the generated data set, written to disk in COCO format.

Ten classes defined by shape and texture, not by colour, from 8 pixels to half the picture, with occlusion, distractors,
uneven light, blur and noise. The same arguments give the same files with any number of processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from fastkd.data.generated import GeneratedFolder, check_counts, draw_all
from fastkd.data.scenes_render import SCENE_KINDS, SceneStyle, render_scene
from fastkd.files import write_text

GENERATOR_VERSION = 1  # to be incremented when the same arguments give different pictures
SCENE_CLASSES = tuple(SCENE_KINDS)
SPLITS = ("train", "val")
STAMP = "scenes.json"
JPEG_QUALITY = 93


def _draw_image(task: tuple[str, int, int, int, SceneStyle]) -> tuple[int, int, list[dict]]:
    """Draw and save image `index` of a split; returns (width, height, annotations without ids)."""
    folder, seed, split, index, style = task
    from pycocotools import mask as coco_mask

    picture, labels, masks = render_scene(np.random.default_rng([seed, split, index]), style)
    Image.fromarray(picture).save(os.path.join(folder, f"{index:06d}.jpg"), quality=JPEG_QUALITY, subsampling=0)
    categories = [kind[0] for kind in SCENE_KINDS.values()]
    annotations = []
    encoded = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))) if labels else []
    for label, rle in zip(labels, encoded, strict=True):
        annotations.append(
            {
                "category_id": categories[label],
                "bbox": [float(v) for v in coco_mask.toBbox(rle)],
                "area": float(coco_mask.area(rle)),
                "segmentation": {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")},
                "iscrowd": 0,
            }
        )
    return picture.shape[1], picture.shape[0], annotations


def _write_split(root: Path, split: str, count: int, parameters: dict, results: list) -> None:
    """Collect the drawn images in order and write the split's annotation file."""
    images: list[dict] = []
    annotations: list[dict] = []
    for index, (width, height, found) in enumerate(results):
        image_id = index + 1
        images.append({"id": image_id, "file_name": f"{index:06d}.jpg", "width": width, "height": height})
        for annotation in found:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    categories = [{"id": kind[0], "name": name, "supercategory": kind[1]} for name, kind in SCENE_KINDS.items()]
    info = {"description": f"fastkd scenes, {split}: {count} generated images", **parameters}
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    write_text(root / "annotations" / f"{split}.json", json.dumps(content, separators=(",", ":")))


def generate_scenes(
    root: str | os.PathLike,
    *,
    train: int = 8000,
    val: int = 500,
    seed: int = 0,
    processes: int = 2,
    progress=None,
    **style,
) -> Path:
    """Write the scenes data set, unless it is there already with the same arguments.

    Files: root/{train,val}/000000.jpg ..., root/annotations/{train,val}.json (COCO: boxes and run-length masks of the
    visible part), root/scenes.json (the arguments). Image i of a split depends on (seed, split, i, style) only.

    Args:
        root: folder; new, empty, or written by this function before (then replaced when the arguments differ).
        train, val: images of each split, >= 0.
        seed: >= 0.
        processes: drawing processes, >= 1; does not affect the result.
        progress: called repeatedly as progress(done, total), or None.
        **style: difficulty, the fields of SceneStyle (noise, clutter, occlusion, min_visible, contrast, sizes ...).
    Returns: root as a Path.
    Raises: ValueError for bad arguments or a folder that holds something else.
    """
    check_counts("generate_scenes", train=(train, 0), val=(val, 0), seed=(seed, 0), processes=(processes, 1))
    known = {item.name for item in dataclasses.fields(SceneStyle)}
    if set(style) - known:
        raise TypeError(f"generate_scenes: unknown arguments {sorted(set(style) - known)}; known: {sorted(known)}")
    look = SceneStyle(**style)
    root = Path(root)
    parameters = {"generator": "fastkd scenes", "version": GENERATOR_VERSION, "seed": seed, "train": train, "val": val}
    parameters["style"] = dataclasses.asdict(look)
    folder = GeneratedFolder("generate_scenes", root, STAMP, (*SPLITS, "annotations"), parameters)
    if folder.is_there():
        return root
    with folder.writing():
        jobs = {}
        for number, (split, count) in enumerate(zip(SPLITS, (train, val), strict=True)):
            (root / split).mkdir()
            jobs[split] = [(str(root / split), seed, number, index, look) for index in range(count)]
        (root / "annotations").mkdir()
        for split, results in draw_all(_draw_image, jobs, processes, progress):
            _write_split(root, split, len(results), folder.parameters, results)
    return root
