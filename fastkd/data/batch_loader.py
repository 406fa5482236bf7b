"""Prefetches batches in worker processes, which are always stopped together with the iterator."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Generator, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from fastkd.data.images import BadImageError
from fastkd.types import Batch

log = logging.getLogger("fastkd.data")


class LoaderError(RuntimeError):
    """A loader process ended before its time."""


@contextlib.contextmanager
def explaining_dead_workers() -> Iterator[None]:
    """Raises LoaderError for torch's error about a dead loader process, which may interrupt any line of the block."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not text.startswith("DataLoader worker"):
            raise
        raise LoaderError(
            f"data: a loader process died ({text.splitlines()[0].rstrip('. ')}), perhaps for lack of memory; earlier "
            "checkpoints are kept: use fewer workers or a smaller prefetch, and resume"
        ) from error


def _start_worker(parent: int, _: int) -> None:
    """Ignore signals in the worker: the main process handles them and stops the workers.

    Args:
        parent: process id of the main process. torch's workers end when the parent that they find after this call
            changes; without the check, one whose parent was killed before would wait for ever.
    """
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stop_workers(iterator) -> None:
    """Stop the worker processes of a DataLoader's iterator, if it has any; a second call does nothing."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():  # blocked in reading a file
                worker.kill()


def _as_is(item):
    return item


class _Timed(Dataset):
    """Wraps a data set: each item, or the BadImageError in its place, comes with the seconds it took to load.

    An error that is raised in a worker would reach the main process with the worker's traceback as its message.
    """

    def __init__(self, batches):
        self.batches = batches

    def __getitem__(self, number: int):
        begin = time.perf_counter()
        try:
            item = self.batches[number]
        except BadImageError as error:
            item = error
        return item, time.perf_counter() - begin


class BatchLoader:
    """Iterates over the batches `numbers` of a TrainBatches or EvalBatches, with or without worker processes.

    Workers live as long as the iterator, in training for the whole run.

    Attributes:
        bad_images: image id -> number of failed reads; the first failure of each image is logged.
    """

    def __init__(self, batches, numbers: range, *, workers: int, pin_memory: bool, prefetch: int = 2):
        self.batches = batches
        self.numbers = numbers
        self.bad_images: Counter[int] = Counter()
        self._makers, self._images, self._seconds = max(1, workers), 0, 0.0
        forks = workers and "fork" in multiprocessing.get_all_start_methods()
        self._loader = DataLoader(
            _Timed(batches),
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            prefetch_factor=prefetch if workers else None,
            generator=torch.Generator(),  # starting workers must not advance the global generator
            multiprocessing_context="fork" if forks else None,  # children share the flat arrays
        )

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the data."""
        return getattr(self.batches, "steps_per_epoch", len(self.numbers))

    def __iter__(self) -> Generator[Batch, None, None]:
        self._loader.worker_init_fn = functools.partial(_start_worker, os.getpid())
        iterator = iter(self._loader)
        stop = functools.partial(_stop_workers, iterator)
        # An exception whose traceback references this iterator keeps the workers alive until the interpreter exits,
        # which would then wait for them forever, because they ignore its SIGTERM.
        atexit.register(stop)
        try:
            for item, seconds in iterator:
                if isinstance(item, BadImageError):
                    raise item
                batch, bad = item
                self._note(bad)
                self._seconds += seconds
                if batch is not None:
                    self._images += len(batch)
                    yield batch
        finally:
            stop()
            atexit.unregister(stop)

    def take_rate(self) -> float:
        """Images per second that all workers of this process together can load, measured since the last call.

        0.0 without batches. The time is measured in the workers, so the rate does not depend on whether training waits.
        """
        rate = self._images / self._seconds * self._makers if self._images else 0.0
        self._images, self._seconds = 0, 0.0
        return rate

    def _note(self, bad: list[tuple[int, str]]) -> None:
        for image_id, message in bad:
            self.bad_images[image_id] += 1
            if self.bad_images[image_id] == 1:
                log.warning("%s; image id %d, %s", message, image_id, self.batches.bad_image_is)
