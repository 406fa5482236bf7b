"""Extra memory of a call: what torch's allocators hand out and take back while it runs, inside operators too.

Scratch that a library gets from the system itself (oneDNN, MKL) is not seen; that favours plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from fastkd.training.cost.memory import transient_peak


@dataclass(frozen=True)
class Memory:
    """Bytes a call takes on top of what is there before it.

    Args:
        peak: at the worst moment.
        largest: the largest single allocation; 0 on a GPU, whose allocator does not tell.
    """

    peak: int
    largest: int


def measure(call: Callable[[], object], device: torch.device) -> Memory:
    """Memory of one call; its results are dropped."""
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
