"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """fsync of a file, or of a folder's directory entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; renames it to `path` after the block, or deletes it if the block raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically; makes its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_list(path: Path, items: Iterable[Any]) -> None:
    """Writes a JSON list atomically, one item a line, without holding the items or the text in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        separator = "[\n"
        for item in items:
            file.write(separator + json.dumps(item, allow_nan=False))
            separator = ",\n"
        file.write("\n]\n" if separator == ",\n" else "[]\n")


def write_json(path: Path, value: Any, *, allow_nan: bool = False) -> None:
    """Writes a JSON file atomically.

    Raises: ValueError for NaN and infinity, which standard JSON does not have, unless allow_nan is True.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=allow_nan) + "\n")
