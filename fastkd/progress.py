"""Progress of long work on the terminal: a bar with rate and time left, or the time so far where nothing is counted.

Shown on standard error if that is a terminal, by the first process only, and not after `be_quiet()` (--quiet). Work
that begins inside other work gets a line below it. A line disappears when its work is done.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # imported at run time where something is shown: rich is not needed otherwise
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")
EVERY = 0.1  # seconds between two updates of a bar

_quiet = False
_shown: tuple[Progress, int] | None = None  # the display in use, and its number of lines


def be_quiet(quiet: bool = True) -> None:
    """Shows no progress in this process from now on, or shows it again."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether `be_quiet` was called."""
    return _quiet


class Work:
    """A line of the display. Args: display: None shows nothing; task: its number in the display."""

    def __init__(self, display: Progress | None = None, task: Any = None):
        self._display, self._task = display, task
        self._done, self._last = 0, 0.0

    def advance(self, count: int = 1) -> None:
        """Counts finished units."""
        self.update(self._done + count)

    def update(self, done: int, total: int | None = None) -> None:
        """Sets the number of finished units, and that of all if it has become known."""
        self._done, now = done, time.perf_counter()
        if self._display is not None and (now - self._last >= EVERY or total is not None):
            self._last = now
            if total is None:
                self._display.update(self._task, completed=done)
            else:
                self._display.update(self._task, completed=done, total=total)


@contextlib.contextmanager
def showing(what: str, unit: str = "", total: int | None = None, *, console: Console | None = None) -> Iterator[Work]:
    """Shows a line during the block.

    Args:
        what: the work, e.g. "evaluate".
        unit: what is counted, plural, e.g. "images".
        total: number of units; None if unknown.
        console: where to show it; None is standard error.
    """
    display = _begin(console)
    if display is None:
        yield Work()
        return
    task = display.add_task(what, total=total, unit=unit)
    try:
        yield Work(display, task)
    finally:
        display.remove_task(task)
        _end(display)


def track(
    items: Iterable[T], what: str, unit: str, total: int | None = None, *, console: Console | None = None
) -> Iterator[T]:
    """Yields the items and shows how many were processed, of `total`, or of all where the items have a length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with showing(what, unit, total, console=console) as work:
        for done, item in enumerate(items, start=1):
            yield item
            work.update(done)


def _begin(console: Console | None) -> Progress | None:
    """The display with one more line; None if nothing is to be shown."""
    global _shown
    if _quiet or os.environ.get("RANK", "0") != "0":
        return None
    if _shown is None:
        from rich.console import Console

        console = console or Console(stderr=True)
        if not console.is_terminal:
            return None
        display = _make_display(console)
        display.start()
        _shown = (display, 0)
    _shown = (_shown[0], _shown[1] + 1)
    return _shown[0]


def _end(display: Progress) -> None:
    """Removes the display with its last line."""
    global _shown
    if _shown is None or _shown[0] is not display:
        return  # closed before
    _shown = (display, _shown[1] - 1) if _shown[1] > 1 else None
    if _shown is None:
        display.stop()


def close() -> None:
    """Removes the display, whatever is in progress: for an error, whose traceback keeps the work's frames alive."""
    global _shown
    if _shown is not None:
        _shown[0].stop()
        _shown = None


def _make_display(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Figures(ProgressColumn):
        """Count, rate and time left of a task."""

        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            return Text(figures(task.completed, task.total, task.elapsed or 0.0, task.speed, task.fields["unit"]))

    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), Figures()
    return Progress(*columns, console=console, transient=True, redirect_stdout=False, refresh_per_second=4)


def figures(done: float, total: float | None, elapsed: float, speed: float | None, unit: str) -> str:
    """Count, rate and time left, e.g. "120/500 images  31.2 images/s  12 s left"; at first only the time so far.

    Args:
        speed: units per second lately; None takes the mean since the beginning.
    """
    if not done or elapsed <= 0:
        return f"{clock(elapsed)}"
    rate = speed or done / elapsed
    count = f"{done:,.0f} {unit}" if total is None else f"{done:,.0f}/{total:,.0f} {unit}"
    left = "" if total is None else f"  {clock((total - done) / rate)} left"
    return f"{count}  {rate:,.1f} {unit}/s{left}"


def clock(seconds: float) -> str:
    """A duration as 12 s, 3:05 min or 2:07 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"
