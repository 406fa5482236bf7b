"""Finished runs, one JSON object each in docs/results/hosts.json: which are recorded, which are missing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.hosts.plan import Run
from fastkd.files import write_json_list

Record = dict[str, Any]  # host, method, seed, settings, commit, AP, seconds, ...


def read(path: Path) -> list[Record]:
    """The records of a file; none if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def run_of(record: Record) -> Run:
    """The run of a record."""
    return Run(record["host"], record["method"], record["seed"])


def find(records: Iterable[Record], run: Run, settings: Record) -> Record | None:
    """The record of a run with these settings; None if it is missing."""
    return next((one for one in records if run_of(one) == run and one["settings"] == settings), None)


def add(path: Path, record: Record) -> list[Record]:
    """Writes a record to the file, in the place of one of the same run; returns all records.

    The file is read again under a lock, so that records which other campaigns added meanwhile are kept.
    """
    with locked(path):
        others = [one for one in read(path) if run_of(one) != run_of(record)]
        records = sorted([*others, record], key=lambda one: (one["host"], one["seed"], one["method"]))
        write_json_list(path, records)
    return records


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until nobody else is in such a context for the file's folder; the lock ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
