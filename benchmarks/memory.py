"""Additional memory of a call, from the allocations of torch's allocators, also inside operators.

Memory that a library allocates directly from the system (oneDNN, MKL) is not counted, which favours plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from fastkd.training.cost.memory import transient_peak


@dataclass(frozen=True)
class Memory:
    """Bytes that a call allocates beyond those allocated before it.

    Args:
        peak: maximum during the call.
        largest: the largest single allocation; 0 on a GPU, whose allocator does not report it.
    """

    peak: int
    largest: int


def measure(call: Callable[[], object], device: torch.device) -> Memory:
    """Memory of one call; its results are discarded."""
    if device.type == "cuda":
        return Memory(transient_peak(call, device), 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak, largest = max(peak, current), max(largest, event.nbytes())
    return Memory(peak, largest)
