"""Time of a call on a GPU: wall time, and replay from a CUDA graph, which excludes the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall(call: Callable[[], object], device: torch.device, seconds: float, least: int = 3) -> dict[str, Any]:
    """{"wall_ms": median, "wall_min_ms", "rounds"}: each round starts and ends with an idle device."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < least or (time.perf_counter() < end and len(taken) < 200):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        taken.append(1e3 * (time.perf_counter() - begin))
    return {"wall_ms": statistics.median(taken), "wall_min_ms": min(taken), "rounds": len(taken)}


def graph(call: Callable[[], object], seconds: float) -> dict[str, Any]:
    """{"graph_ms": median of replays}, or {"graph_error"} for a call that a CUDA graph cannot capture."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            kept = call()
    except Exception as error:
        torch.cuda.synchronize()
        return {"graph_error": f"{type(error).__name__}: {error}"[:300]}
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 5 or (time.perf_counter() < end and len(taken) < 200):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        captured.replay()
        last.record()
        last.synchronize()
        taken.append(first.elapsed_time(last))
    del kept
    return {"graph_ms": statistics.median(taken), "graph_min_ms": min(taken)}


def measure(
    call: Callable[[], object], device: torch.device, seconds: float = 0.4, captured: bool = True
) -> dict[str, Any]:
    """Wall time; on a GPU also the time of a replayed graph and the additional peak memory.

    Args:
        seconds: per kind of timing; 0: one call, for a rehearsal.
        captured: whether to try a CUDA graph.
    """
    for _ in range(2 if seconds else 0):
        call()
    found = wall(call, device, seconds, least=3 if seconds else 1)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        if captured:
            found |= graph(call, seconds)
    return found
