"""What several subcommands share: messages, devices, checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastkd.progress import is_quiet

OwnDetectors = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="detector", metavar="MODULE:CLASS")
]
STUDENT_FILE = "student.safetensors"


def say(message: str) -> None:
    """Prints a message on stderr, so that stdout carries results only; nothing under --quiet."""
    from rich.console import Console
    from rich.text import Text

    from fastkd.text import printable

    if not is_quiet():
        Console(stderr=True, soft_wrap=True).print(Text(printable(message)))


def choose_device(name: str):
    """The torch device of a name; `auto` is the GPU if there is one, else the CPU.

    Raises: ValueError if there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device must be available, got {name!r} with {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    return device


def device_argument(name: str):
    """The checked device, or None for `auto`, for functions that choose a device themselves."""
    return None if name == "auto" else choose_device(name)


def find_checkpoint(path: Path) -> Path:
    """The detector's file: `path`, or student.safetensors in it if `path` is a run directory.

    Raises: ValueError if there is none.
    """
    if path.is_dir():
        if not (path / STUDENT_FILE).is_file():
            raise ValueError(
                f"CHECKPOINT must be a .safetensors file or a finished run directory, got {path} without "
                f"{STUDENT_FILE}; finish the training first"
            )
        return path / STUDENT_FILE
    if not path.is_file():
        raise ValueError(f"CHECKPOINT must be an existing run directory or .safetensors file, got {path}")
    return path


def use_detectors(names: Sequence[str]) -> None:
    """Imports the detectors of one's own that the user named with --detector."""
    from fastkd.detectors import use_detector

    for name in names:
        use_detector(name)


def take_detectors(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of --detector, which are imported, and the other arguments: tyro has --detector.FIELD for itself."""
    parser = argparse.ArgumentParser(prog="fastkd", add_help=False, allow_abbrev=False)
    parser.add_argument("--detector", action="append", default=[], metavar="MODULE:CLASS")
    known, rest = parser.parse_known_args(list(args))
    use_detectors(known.detector)
    return known.detector, rest


def require_file(path: Path, name: str) -> Path:
    """Returns `path` if it is a file; otherwise raises ValueError about the argument `name`."""
    if not path.is_file():
        raise ValueError(f"{name} must be an existing file, got {path}")
    return path


def require_folder(path: Path, name: str) -> Path:
    """Returns `path` if it is a folder; otherwise raises ValueError about the argument `name`."""
    if not path.is_dir():
        raise ValueError(f"{name} must be an existing folder, got {path}")
    return path


@dataclass(frozen=True)
class ImageSize:
    """Sizes of the detector's input images.

    Args:
        short_side, max_side: see fastkd.data.transforms.resized_size; None keeps the original size.
        divisor: padded height and width are multiples of it.
    """

    short_side: int | None = None
    max_side: int | None = None
    divisor: int = 32


def image_size(checkpoint: Path, short_side: int | None, max_side: int | None) -> ImageSize:
    """The given sizes; where None, the evaluation sizes of the run that contains the checkpoint."""
    import json

    path = checkpoint.parent / "recipe.json"
    if short_side is not None or max_side is not None or not path.is_file():
        return ImageSize(short_side, max_side)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        return ImageSize(int(data["val_short_side"]), int(data["max_side"]), int(data["divisor"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} must be a recipe, got {error!r}; pass --short-side and --max-side") from error
