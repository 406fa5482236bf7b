"""Runs work on a separate CUDA stream, concurrently with the current stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """One additional stream per device, created when first needed. On a CPU, work runs immediately.

    Args:
        cuda: module with the stream functions; None for torch.cuda. Replaced in tests.
        kinds: device types with streams. Replaced in tests.
    """

    def __init__(self, cuda: Any = None, kinds: tuple[str, ...] = ("cuda",)):
        self.cuda, self.kinds = cuda, kinds
        self._streams: dict[torch.device, Any] = {}

    def start(self, work: Callable[[], list[Tensor]], used: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Starts work on the side stream, after everything queued on the current stream so far.

        Args:
            work: function without arguments that returns new tensors.
            used: tensors of the current stream that `work` reads; their memory is not reused before it has finished.
        Returns: a function that makes the then current stream wait for `work` and returns the results.
        """
        device, cuda = used[0].device, self.cuda or torch.cuda
        if device.type not in self.kinds:
            results = work()
            return lambda: results
        if device not in self._streams:
            self._streams[device] = cuda.Stream(device)
        side = self._streams[device]
        side.wait_stream(cuda.current_stream(device))
        with cuda.stream(side):
            results = work()
        for tensor in used:
            tensor.record_stream(side)

        def finish() -> list[Tensor]:
            current = cuda.current_stream(device)
            current.wait_stream(side)
            for tensor in results:
                tensor.record_stream(current)
            return results

        return finish
