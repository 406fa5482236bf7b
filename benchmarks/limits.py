"""What the machine can do at most, measured in the same run as the ops: bytes copied and multiply-adds a second."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F


def copy(quick: bool, device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy of 256 MiB; bytes read and written."""
    source = torch.ones(2**20 if quick else 2**26, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel() * source.element_size()


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
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        source = Path(__file__).with_name("fma_peak.cpp")
        compiler = os.environ.get("CXX", "c++")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).multiply_adds
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
    "multiply-adds": (registers, "GFLOP/s"),
    "matmul": (matmul, "GFLOP/s"),
    "conv3x3": (convolution, "GFLOP/s"),
}


def rate(name: str, work: int, seconds: float) -> float:
    """GB/s, or GFLOP/s with two operations a multiply-add."""
    return work * (1 if LIMITS[name][1] == "GB/s" else 2) / seconds / 1e9


def arithmetic_limit(device: torch.device) -> str:
    """The name of the limit that an op's multiply-adds are held against."""
    return "multiply-adds" if device.type == "cpu" else "matmul"
