"""Work on a GPU stream of its own, beside what the current stream does meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """One stream beside the current one, made when it is first needed. On a CPU work is done at once.

    Args:
        cuda: what gives streams, None for torch.cuda; kinds: the types of device that have them. Others are for tests.
    """

    def __init__(self, cuda: Any = None, kinds: tuple[str, ...] = ("cuda",)):
        self.cuda, self.kinds = cuda, kinds
        self._streams: dict[torch.device, Any] = {}

    def start(self, work: Callable[[], list[Tensor]], used: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Starts work that waits for what was asked of the current stream so far.

        Args:
            work: without arguments; gives new tensors.
            used: tensors of the current stream that it reads; their memory is not given away before it is done.
        Returns: what gives the results, for the stream that is then the current one, which waits for them.
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
