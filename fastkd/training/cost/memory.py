"""Peak memory of a function call: from the allocator on a GPU, from a count of tensor storages on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of the tensor storages that operators allocate, until they are freed.

    Covers every operator of forward, backward and optimiser in this thread, but not scratch memory inside an operator.

    Attributes:
        current: bytes allocated since the start and not yet freed.
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
    """Peak memory of `work` above the memory in use before, bytes.

    Args:
        work: called once.
        device: the GPU or CPU that `work` uses.
        known: existing tensors (weights, states), which are not counted when an operator returns them.
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
