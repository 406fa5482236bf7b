"""Writing a generated data set into a folder of its own, once, the same with any number of processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastkd.files import write_text


def check_counts(who: str, **values: tuple[Any, int]) -> None:
    """Raises ValueError unless each value, given with its least, is an int at least that."""
    for name, (value, low) in values.items():
        if not isinstance(value, int) or value < low:
            raise ValueError(f"{who}: {name} must be an int >= {low}, got {value!r}")


class GeneratedFolder:
    """A folder that holds a generated data set and nothing else, and a stamp that tells its arguments.

    Args:
        who: the function named in messages.
        root: the folder.
        stamp: name of the file with the arguments.
        owned: names of the other entries.
        parameters: the arguments; JSON types.
    """

    def __init__(self, who: str, root: Path, stamp: str, owned: Iterable[str], parameters: dict[str, Any]):
        self.who, self.root, self.stamp, self.owned = who, root, stamp, tuple(owned)
        self.parameters = json.loads(json.dumps(parameters))

    def is_there(self) -> bool:
        """Whether the folder was written whole with the same arguments."""
        try:
            return json.loads((self.root / self.stamp).read_text()) == self.parameters
        except (OSError, ValueError):
            return False

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Empties the folder before and stamps it after.

        Raises: ValueError for a folder that holds something else.
        """
        self._clear()
        self.root.mkdir(parents=True, exist_ok=True)
        self._stamp({"unfinished": True})  # marks the folder as ours; replaced when all is written
        yield
        self._stamp(self.parameters)

    def _stamp(self, content: dict[str, Any]) -> None:
        write_text(self.root / self.stamp, json.dumps(content, separators=(",", ":")))

    def _clear(self) -> None:
        entries = {entry.name for entry in self.root.iterdir()} if self.root.exists() else set()
        foreign = entries - {*self.owned, self.stamp}
        if foreign or (entries and self.stamp not in entries):
            raise ValueError(
                f"{self.who}: root must be a new, empty or formerly generated folder, got {self.root} which holds "
                f"{sorted(foreign or entries)[:3]}; choose another folder"
            )
        for name in self.owned:
            path = self.root / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def draw_all(
    draw: Callable[[Any], Any],
    jobs: dict[str, list[Any]],
    processes: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, list[Any]]]:
    """The results of draw(task) for the tasks of each job, in order.

    Args:
        draw: a module-level function.
        jobs: name -> tasks.
        processes: that draw.
        progress: called as progress(done, total) now and then, or None.
    """
    pool = None
    if processes > 1:
        method = "fork" if sys.platform == "linux" else "spawn"
        pool = multiprocessing.get_context(method).Pool(processes)
    done, total = 0, sum(map(len, jobs.values()))
    try:
        for name, tasks in jobs.items():
            collected = []
            for result in pool.imap(draw, tasks, chunksize=16) if pool else map(draw, tasks):
                collected.append(result)
                done += 1
                if progress and (done % 50 == 0 or done == total):
                    progress(done, total)
            yield name, collected
    finally:
        if pool:
            pool.terminate()
            pool.join()
