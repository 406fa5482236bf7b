"""Peak rates of the machine, measured in the same run as the ops: bytes moved and multiply-adds per second.

Bytes: all threads read arrays and write one (bandwidth.cpp), without computation, in already allocated memory unless
stated otherwise. A pyramid of the benchmark is smaller than the last-level cache of a server CPU, so inputs and outputs
of the ops partly stay in the cache between calls; the same holds for `copy`, `fill` and the floors of the rows, which
move as many bytes. `large copy` goes to memory. Each is the faster of normal and streaming stores.
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

PYRAMID = 40 * 2**20  # bytes; a pyramid of the base shape has 39.6 MiB


@dataclass(frozen=True)
class Pass:
    """Necessary traffic of a part of a call: elements read from each tensor, and elements written to one."""

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
    """The faster of form(False) and form(True)."""
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
    """A call with the memory traffic of these passes; outputs are allocated, as in the ops."""
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
    """A copy of the size of a pyramid; bytes read and written."""
    source = torch.ones(2**20 if quick else size // 4, device=device)
    target = torch.zeros_like(source)
    work = 2 * source.nbytes
    if device.type != "cpu":
        return lambda: target.copy_(source), work
    return faster(lambda past_caches: move([source], target, past_caches, torch.get_num_threads())), work


def large_copy(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy of one gibibyte, from memory to memory."""
    return copy(quick, device, 2**30)


def fill(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """Repeated writes to one buffer of the size of a pyramid; bytes."""
    target = torch.zeros(2**20 if quick else PYRAMID // 4)
    return faster(lambda past_caches: move([], target, past_caches, torch.get_num_threads())), target.nbytes


def fresh_fill(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """The same with allocation by torch each time, as for an op's output; bytes."""
    count = 2**20 if quick else PYRAMID // 4
    return faster(lambda past_caches: move([], torch.empty(count), past_caches, torch.get_num_threads())), 4 * count


def faulted_fill(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """The same in memory mapped and unmapped by the system each time; bytes."""
    size = 2**20 if quick else PYRAMID

    def run(past_caches: bool) -> None:
        with mmap.mmap(-1, size) as memory:
            target = torch.frombuffer(memory, dtype=torch.uint8)
            move([], target, past_caches, torch.get_num_threads())
            del target

    return faster(run), size


def matmul(quick: bool, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], object], int]:
    """A product of two square matrices; multiply-adds."""
    side = 64 if quick else 2048
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: first @ second, side**3


def convolution(
    quick: bool, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], object], int]:
    """A 3x3 convolution of 256 channels on 100 x 152 cells, channels-last; multiply-adds."""
    channels, rows, columns = (8, 8, 8) if quick else (256, 100, 152)
    level = torch.randn(1, channels, rows, columns, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return lambda: F.conv2d(level, weight, padding=1), 9 * channels**2 * rows * columns


def registers(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """Multiply-adds in registers in all threads, compiled from fma_peak.cpp for this CPU."""
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
    """GB/s, or GFLOP/s with two operations per multiply-add."""
    return work * (1 if LIMITS[name][1] == "GB/s" else 2) / seconds / 1e9


def arithmetic_limit(device: torch.device) -> str:
    """The name of the limit for an op's multiply-adds."""
    return "multiply-adds" if device.type == "cpu" else "matmul"
