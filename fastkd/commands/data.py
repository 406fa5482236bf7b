"""`fastkd data scenes` and `fastkd data crowd`: write the generated data sets."""

from __future__ import annotations

from pathlib import Path

from fastkd.commands.common import say
from fastkd.progress import showing

TRAIN_IMAGES, VAL_IMAGES = 8000, 500  # the sizes that the demo uses
CROWD_TRAIN, CROWD_VAL = 4000, 400


def scenes(
    root: Path = Path("data/scenes"),
    train: int = TRAIN_IMAGES,
    val: int = VAL_IMAGES,
    seed: int = 0,
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
        processes: Processes that draw; changes only the time it takes.
    """
    write_scenes(root, train=train, val=val, seed=seed, processes=processes)
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
