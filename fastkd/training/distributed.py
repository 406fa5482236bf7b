"""Processes of one run: who am I, and agreeing on small things. One process needs no process group."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Args:
        rank: number of this process.
        world_size: number of processes.
        device: where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            self.agree([0.0])

    def agree(self, values: list[float]) -> list[float]:
        """The elementwise maximum over all processes; exchanged on the CPU."""
        if self.world_size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.tolist()

    def mean(self, values: Tensor) -> Tensor:
        """The elementwise mean of a CPU tensor over all processes."""
        if self.world_size == 1:
            return values
        shared = values.clone()
        dist.all_reduce(shared)
        return shared / self.world_size

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (anything that pickles: it never leaves the run's own processes) in every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank, in every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first_does(self, function: Callable[[], Any]) -> Any:
        """Rank 0 calls the function; every process gets its result, or raises its error."""
        result, error = None, None
        if self.first:
            try:
                result = function()
            except Exception as caught:
                error = caught
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the processes; itself with one process or nothing to train.

        Batch statistics (norm "bn") belong to each process; buffers are rank 0's, copied before every step.
        """
        if self.world_size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        own = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
        return DistributedDataParallel(module, broadcast_buffers=own, gradient_as_bucket_view=True)


@contextlib.contextmanager
def processes(device: torch.device | str | None = None) -> Iterator[Processes]:
    """Joins the processes that torchrun started (from its environment variables), and leaves them at the end.

    A process group that exists already is used and left alone. The backend is gloo on the CPU; with GPUs, tensors there
    go through nccl and small agreements still through gloo.

    Args:
        device: "cpu", "cuda" or a torch.device; None takes a GPU if there is one.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"train: device must be one torch can see, got {device} without a GPU; pass --device cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    started = False
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        started = True
    try:
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size(), device)
        else:
            yield Processes(0, 1, device)
    finally:
        if started:
            dist.destroy_process_group()
