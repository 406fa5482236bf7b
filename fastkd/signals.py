"""SIGTERM and Ctrl-C: the first signal ends training after a checkpoint, the second one at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupted(Exception):
    """A signal stopped the run, and everything is saved. Args: signum: the signal."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The shell's exit code: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signum

    @classmethod
    def with_exit_code(cls, exit_code: int) -> Interrupted:
        """The inverse of `exit_code`."""
        return cls(exit_code - 128)


class StopSignals:
    """Records SIGTERM and SIGINT. Use as a context manager around training.

    Handlers can only be installed in the main thread; in other threads signals are not caught. Loader processes ignore
    both signals, so that a Ctrl-C in the terminal, which reaches all processes, does not stop them.

    Attributes:
        received: number of the signal; 0 if none was received.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        self._raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in self.SIGNALS:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _handle(self, signum: int, frame: object) -> None:
        again, self.received = self.received, signum
        if again:
            raise KeyboardInterrupt
        if self._raise:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def interrupt_at_once(self) -> Iterator[None]:
        """Within the context a signal, even one received before, raises Interrupted at once; nothing needs saving."""
        self._raise = True
        try:
            if self.received:
                raise Interrupted(self.received)
            yield
        finally:
            self._raise = False
