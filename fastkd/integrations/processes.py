"""Agreement between the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.ops._support.normalizer import global_mean, is_distributed, recorded_counts

Result = TypeVar("Result")


class Agreement:
    """Runs a part of every step that may fail in some processes only, so that they all go on alike."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []  # of the part's calls of global_mean
        self._world: Any = None
        self._group: Any = None

    def attempt(self, part: Callable[[], Result]) -> Result | Exception:
        """The result of `part`, or the error if it failed in any process; all processes call this together.

        After a failure in the first call, or before another collective operation than `global_mean`, the other
        processes wait in vain.
        """
        result: Result | Exception
        with recorded_counts() as counts:
            try:
                result = part()
            except Exception as error:
                result = error
                for count in self._counts[len(counts) :]:  # the other processes wait for them
                    global_mean(torch.zeros_like(count))
        self._counts = counts
        if self._all(not isinstance(result, Exception)) or isinstance(result, Exception):
            return result
        return RuntimeError("fastkd: the distillation failed in another process, see its warnings")

    def _all(self, succeeded: bool) -> bool:
        if not is_distributed():
            return succeeded
        if self._world is not dist.group.WORLD:
            # Reading the result from a GPU would synchronise it in every step, therefore the flag stays on the CPU.
            self._world = dist.group.WORLD
            self._group = None if "gloo" in str(dist.get_backend_config()) else dist.new_group(backend="gloo")
        flag = torch.tensor(int(succeeded))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return bool(flag)
