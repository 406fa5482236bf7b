"""Peak memory of a piece of work: the allocator's own count on a GPU, a count of tensor storages on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of tensor storages that operators make, and notices when they are freed.

    Sees every operator of forward, backward and optimiser in this thread, but not scratch memory inside an operator.

    Attributes:
        current: bytes made since the start and still alive.
        peak: the largest `current` so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.current = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        for tensor in known:
            self._watch(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                self._watch(storage, storage.nbytes())
        return result

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.current += size
        self.peak = max(self.peak, self.current)

    def _forget(self, key: int, size: int) -> None:
        del self._alive[key]
        self.current -= size


def transient_peak(work: Callable[[], object], device: torch.device, known: Iterable[Tensor] = ()) -> int:
    """Bytes that `work` needs on top of what is there before it.

    Args:
        work: called once.
        device: a GPU, whose allocator keeps count, or the CPU.
        known: tensors that exist already and are not to be counted when an operator returns them (weights, states).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with StorageMeter(known) as meter:
        work()
    return meter.peak
