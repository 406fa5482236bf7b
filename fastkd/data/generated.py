"""Writes a generated data set into a folder, once; the result does not depend on the number of processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastkd.files import write_text


def check_counts(caller: str, **values: tuple[Any, int]) -> None:
    """Raises ValueError unless each (value, minimum) has an int value of at least the minimum."""
    for name, (value, low) in values.items():
        if not isinstance(value, int) or value < low:
            raise ValueError(f"{caller}: {name} must be an int >= {low}, got {value!r}")


class GeneratedFolder:
    """A folder that contains only a generated data set and a stamp file with the generator's arguments.

    Args:
        caller: function name for messages.
        root: the folder.
        stamp: name of the file with the arguments.
        owned: names of the other entries of the folder.
        parameters: the arguments; JSON types.
    """

    def __init__(self, caller: str, root: Path, stamp: str, owned: Iterable[str], parameters: dict[str, Any]):
        self.caller, self.root, self.stamp, self.owned = caller, root, stamp, tuple(owned)
        self.parameters = json.loads(json.dumps(parameters))

    def is_there(self) -> bool:
        """Whether the folder is complete and was written with the same arguments."""
        try:
            return json.loads((self.root / self.stamp).read_text()) == self.parameters
        except (OSError, ValueError):
            return False

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Empties the folder before the block and writes the stamp after it.

        Raises: ValueError if the folder contains other files.
        """
        self._clear()
        self.root.mkdir(parents=True, exist_ok=True)
        self._stamp({"unfinished": True})  # marks the folder as generated; replaced when it is complete
        yield
        self._stamp(self.parameters)

    def _stamp(self, content: dict[str, Any]) -> None:
        write_text(self.root / self.stamp, json.dumps(content, separators=(",", ":")))

    def _clear(self) -> None:
        entries = {entry.name for entry in self.root.iterdir()} if self.root.exists() else set()
        foreign = entries - {*self.owned, self.stamp}
        if foreign or (entries and self.stamp not in entries):
            raise ValueError(
                f"{self.caller}: root must be a new, empty or formerly generated folder, got {self.root} which holds "
                f"{sorted(foreign or entries)[:3]}; choose another folder"
            )
        for name in self.owned:
            path = self.root / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _ignore_ctrl_c() -> None:
    """In a drawing process: a Ctrl-C of the terminal reaches all processes, and the main one ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
        processes: number of drawing processes.
        progress: called repeatedly as progress(done, total), or None.
    """
    pool = None
    if processes > 1:
        method = "fork" if sys.platform == "linux" else "spawn"
        pool = multiprocessing.get_context(method).Pool(processes, _ignore_ctrl_c)
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
