"""What the machine can do at most, measured in the same run as the ops: bytes moved and multiply-adds a second.

Bytes: arrays read and one written by all threads (bandwidth.cpp), nothing computed, in memory that is there already
unless said otherwise. A pyramid of the benchmark is smaller than the last cache of a server's CPU, and what the ops
read and write stays there in part between calls; so does what `copy`, `fill` and the floors of the rows move, as they
move as much. `large copy` goes to memory. Each is the faster of two forms: writing into the caches, past them.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

PYRAMID = 40 * 2**20  # bytes, about; that of the base shape has 39.6 MiB


@dataclass(frozen=True)
class Pass:
    """What a part of a call must move at least: numbers read from each of its tensors, and numbers written to one."""

    reads: tuple[int, ...] = ()
    writes: int = 0


@functools.cache
def compiled(name: str) -> ctypes.CDLL:
    """A C++ file beside this one, compiled for this CPU."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"{name}.so"
        source = Path(__file__).with_name(f"{name}.cpp")
        flags = ["-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-pthread", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def move(sources: Sequence[Tensor], target: Tensor | None, past_caches: bool, threads: int) -> None:
    """Read all sources and write the target, whose bytes become 1."""
    function = compiled("bandwidth").move_bytes
    function.restype = ctypes.c_long
    starts = (ctypes.c_void_p * len(sources))(*(source.data_ptr() for source in sources))
    sizes = (ctypes.c_long * len(sources))(*(source.nbytes for source in sources))
    out, written = (None, 0) if target is None else (target.data_ptr(), target.nbytes)
    function(
        starts,
        sizes,
        ctypes.c_long(len(sources)),
        ctypes.c_void_p(out),
        ctypes.c_long(written),
        int(past_caches),
        ctypes.c_long(threads),
    )


def faster(form: Callable[[bool], object]) -> Callable[[], object]:
    """The faster of form(past_caches) for either value."""
    best = {}
    for past_caches in (False, True):
        form(past_caches)
        best[past_caches] = min(_seconds(form, past_caches) for _ in range(5))
    return functools.partial(form, min(best, key=best.get))


def _seconds(form: Callable[[bool], object], past_caches: bool) -> float:
    begin = time.perf_counter()
    form(past_caches)
    return time.perf_counter() - begin


def floor(passes: Sequence[Pass], dtype: torch.dtype) -> Callable[[], object]:
    """A call that moves what these passes must, one after another; what is written is allocated, as the ops do."""
    most = [max((p.reads[i] for p in passes if len(p.reads) > i), default=0) for i in range(8)]
    sources = [torch.ones(count, dtype=dtype) for count in most]
    threads = torch.get_num_threads()

    def run(past_caches: bool) -> list[Tensor]:
        written = []
        for one in passes:
            target = torch.empty(one.writes, dtype=dtype) if one.writes else None
            reads = [source[:count] for source, count in zip(sources, one.reads)]
            move(reads, target, past_caches, threads)
            written.append(target)
        return written

    return faster(run)


def copy(quick: bool, device: torch.device, size: int = PYRAMID) -> tuple[Callable[[], object], int]:
    """A copy of as much as a pyramid; bytes read and written."""
    source = torch.ones(2**20 if quick else size // 4, device=device)
    target = torch.zeros_like(source)
    work = 2 * source.nbytes
    if device.type != "cpu":
        return lambda: target.copy_(source), work
    return faster(lambda past_caches: move([source], target, past_caches, torch.get_num_threads())), work


def large_copy(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy of a gibibyte: from memory to memory."""
    return copy(quick, device, 2**30)


def fill(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """As much as a pyramid written again and again; bytes."""
    target = torch.zeros(2**20 if quick else PYRAMID // 4)
    return faster(lambda past_caches: move([], target, past_caches, torch.get_num_threads())), target.nbytes


def fresh_fill(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """The same, allocated by torch each time, which is what an op's output costs; bytes."""
    count = 2**20 if quick else PYRAMID // 4
    return faster(lambda past_caches: move([], torch.empty(count), past_caches, torch.get_num_threads())), 4 * count


def faulted_fill(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """The same in memory that the system gives and gets back each time; bytes."""
    size = 2**20 if quick else PYRAMID

    def run(past_caches: bool) -> None:
        with mmap.mmap(-1, size) as memory:
            target = torch.frombuffer(memory, dtype=torch.uint8)
            move([], target, past_caches, torch.get_num_threads())
            del target

    return faster(run), size


def matmul(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """A product of two square matrices; multiply-adds."""
    side = 64 if quick else 2048
    first, second = (torch.randn(side, side, device=device) for _ in range(2))
    return lambda: first @ second, side**3


def convolution(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """A 3x3 convolution of 256 channels on 100 x 152 cells, channels-last; multiply-adds."""
    channels, rows, columns = (8, 8, 8) if quick else (256, 100, 152)
    level = torch.randn(1, channels, rows, columns, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(memory_format=torch.channels_last)
    return lambda: F.conv2d(level, weight, padding=1), 9 * channels**2 * rows * columns


def registers(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """Multiply-adds on registers in every thread, compiled from fma_peak.cpp for this CPU."""
    function = compiled("fma_peak").multiply_adds
    function.restype, function.argtypes = ctypes.c_long, [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
    threads, rounds = torch.get_num_threads(), 10_000 if quick else 10_000_000
    results = [(ctypes.c_float * 16)() for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def run() -> int:
        return sum(pool.map(lambda result: function(rounds, result), results))

    return run, run()


# name -> (call and its work, unit of the rate)
LIMITS = {
    "copy": (copy, "GB/s"),
    "large copy": (large_copy, "GB/s"),
    "fill": (fill, "GB/s"),
    "fresh fill": (fresh_fill, "GB/s"),
    "faulted fill": (faulted_fill, "GB/s"),
    "multiply-adds": (registers, "GFLOP/s"),
    "matmul": (matmul, "GFLOP/s"),
    "conv3x3": (convolution, "GFLOP/s"),
}


CPU_ONLY = ("multiply-adds", "large copy", "fill", "fresh fill", "faulted fill")


def rate(name: str, work: int, seconds: float) -> float:
    """GB/s, or GFLOP/s with two operations a multiply-add."""
    return work * (1 if LIMITS[name][1] == "GB/s" else 2) / seconds / 1e9


def arithmetic_limit(device: torch.device) -> str:
    """The name of the limit that an op's multiply-adds are held against."""
    return "multiply-adds" if device.type == "cpu" else "matmul"
