"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastkd.progress import track

_LEFTOVER = re.compile(r"\..+\.\d+\.part|\.tmp[A-Za-z0-9]{6}")


def flush(path: Path) -> None:
    """fsync of a file, or of a folder's directory entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; renames it to `path` after the block, or deletes it if the block raises.

    Raises: OSError that names `path` if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming(path, temporary):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # must not hide the error of the block
            temporary.unlink()
    flush(path.parent)


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Puts the name of `path` into an OSError that names no file, as one of a full disk, or names `temporary`."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or error.filename == str(temporary)
        if error.errno is None or not unnamed:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files that a killed process left in a folder: those of `replacing` and of safetensors."""
    for path in folder.iterdir():
        if is_leftover(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Whether a file name is that of a temporary file of `replacing` or of safetensors."""
    return _LEFTOVER.fullmatch(name) is not None


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
        for item in track(items, f"write {path.name}", "entries"):
            file.write(separator + json.dumps(item, allow_nan=False))
            separator = ",\n"
        file.write("\n]\n" if separator == ",\n" else "[]\n")


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file with one a line, and the number of other lines, blank ones not counted.

    Such a line is incomplete, being written or left by a crash, or damaged.
    """
    records, broken = [], 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                broken += 1
    return records, broken


def write_json(path: Path, value: Any, *, allow_nan: bool = False) -> None:
    """Writes a JSON file atomically.

    Raises: ValueError for NaN and infinity, which standard JSON does not have, unless allow_nan is True.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=allow_nan) + "\n")
