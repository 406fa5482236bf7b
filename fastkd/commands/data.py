"""`fastkd data scenes` and `fastkd data crowd` write the generated data sets, `fastkd data tile` cuts tiles."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from fastkd.commands.common import say
from fastkd.progress import showing

TRAIN_IMAGES, VAL_IMAGES = 8000, 500  # the sizes that the demo uses
CROWD_TRAIN, CROWD_VAL = 4000, 400


def scenes(
    root: Path = Path("data/scenes"),
    train: int = TRAIN_IMAGES,
    val: int = VAL_IMAGES,
    seed: int = 0,
    style: Literal["scenes", "theme"] = "scenes",
    processes: int = 2,
) -> None:
    """Write Scenes, the generated data set, in COCO format.

    Ten classes of shapes and textures, with boxes and masks. The same arguments always give the same files; if they are
    there already, nothing is done.

    Args:
        root: Folder for the images and annotations; new, empty, or written by this command before.
        train: Number of training images.
        val: Number of validation images.
        seed: Other seeds give other images.
        style: theme: large objects, one or two classes in a picture.
        processes: Processes that draw; changes only the time it takes.
    """
    from fastkd.data import SCENE_STYLES

    look = dataclasses.asdict(SCENE_STYLES[style])
    write_scenes(root, train=train, val=val, seed=seed, processes=processes, **look)
    say(f"scenes: {train} training and {val} validation images in {root}")


def crowd(
    root: Path = Path("data/crowd"),
    train: int = CROWD_TRAIN,
    val: int = CROWD_VAL,
    seed: int = 0,
    processes: int = 2,
) -> None:
    """Write a generated data set of people in crowds, in CrowdHuman's format (odgt).

    Full, visible and head boxes, and regions to ignore. The same arguments always give the same files; if they are
    there already, nothing is done.

    Args:
        root: Folder for the images and annotations; new, empty, or written by this command before.
        train: Number of training images.
        val: Number of validation images.
        seed: Other seeds give other images.
        processes: Processes that draw; changes only the time it takes.
    """
    write_crowd(root, train=train, val=val, seed=seed, processes=processes)
    say(f"crowd: {train} training and {val} validation images in {root}")


def tile(
    annotations: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[Path],
    root: Path,
    split: Literal["train", "val"] = "train",
    side: int = 512,
    overlap: int = 128,
    min_visible: float = 0.5,
    masks: bool = False,
) -> None:
    """Cut the large images of a COCO-format data set into overlapping tiles, with boxes cut along.

    A box of which a tile shows less than min_visible is a region to ignore in that tile. With an overlap as long as
    the objects, every object is whole in some tile.

    Args:
        annotations: COCO JSON.
        images: Folder of its images.
        root: Folder of the tiles, for --data.root: ROOT/annotations/SPLIT.json and ROOT/SPLIT.
        split: train or val.
        side: Width and height of a tile, pixels; smaller images are one tile.
        overlap: Least overlap of neighbouring tiles, pixels.
        min_visible: Least visible part of an object's area, 0 to 1.
        masks: Cut the instance masks, too.
    """
    from fastkd.data.tiles import Tiling, write_tiles

    tiling = Tiling(side=side, overlap=overlap, min_visible=min_visible)
    counts = write_tiles(annotations, images, root, split, tiling, with_masks=masks)
    say(f"tile: {counts} in {root}")


def write_scenes(root: Path, **options) -> None:
    """generate_scenes, with its progress shown."""
    from fastkd.data import generate_scenes

    _write(generate_scenes, "scenes", root, options)


def write_crowd(root: Path, **options) -> None:
    """generate_crowd, with its progress shown."""
    from fastkd.data import generate_crowd

    _write(generate_crowd, "crowd", root, options)


def _write(generate, name: str, root: Path, options: dict) -> None:
    with showing(f"draw {name}", "images") as work:
        generate(root, **options, progress=work.update)
