"""The distributed processes of a run: rank, small collectives, DDP. A single process needs no process group."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from fastkd.training.config import Recipe

TIMEOUT = 30.0  # minutes
COMPRESSIONS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


@dataclass(frozen=True)
class Processes:
    """Rank, world size and device of this process, and collectives over all processes of the run.

    Args:
        rank: rank of this process.
        world_size: number of processes.
        device: device of this process.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints messages."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            self.all_reduce_max([0.0])

    def all_reduce_max(self, values: list[float]) -> list[float]:
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
        """Rank 0's value in every process; any picklable object, since only processes of this run exchange it."""
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

    def on_rank0(self, function: Callable[[], Any]) -> Any:
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

    def wrap(self, module: nn.Module, *, accumulates: bool = False, compression: str = "none") -> nn.Module:
        """The module in DDP; the module itself with a single process or without trainable parameters.

        Batch statistics (norm "bn") are computed per process; buffers are broadcast from rank 0 before every step.
        Every parameter that requires a gradient gets one in every step, so DDP need not find unused parameters.

        Args:
            module: the module of this process, with the same weights in all processes.
            accumulates: whether some backward passes run under `no_sync`. The graph is then not declared static,
                because torch 2.14 counts these passes as well and skips the all-reduce
                (tests/training/test_four_processes.py).
            compression: "none", or the dtype of the gradients in the all-reduce: "bf16" or "fp16".
        """
        if self.world_size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        own = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
        wrapped = DistributedDataParallel(
            module, broadcast_buffers=own, gradient_as_bucket_view=True, static_graph=not accumulates
        )
        if compression != "none":
            wrapped.register_comm_hook(None, COMPRESSIONS[compression])
        return wrapped

    def wrap_for(self, recipe: Recipe, module: nn.Module) -> nn.Module:
        """`wrap` with the arguments from a recipe."""
        compression = recipe.runtime.grad_compression
        return self.wrap(module, accumulates=recipe.schedule.accumulate > 1, compression=compression)


def no_sync(wrapped: nn.Module, wanted: bool) -> AbstractContextManager:
    """DDP's no_sync for gradient accumulation: within the context gradients are not all-reduced.

    Args:
        wrapped: result of `Processes.wrap`.
        wanted: False for the last micro-batch of a step, which all-reduces the accumulated gradients.
    """
    return wrapped.no_sync() if wanted and isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()


def check_shares(images: int, compression: str, world_size: int) -> None:
    """Checks that a run can be divided over its processes.

    Args:
        images: images of one forward pass over all processes.
        compression: gradient compression, as in `Processes.wrap`.
        world_size: number of processes.
    Raises: ValueError if `images` is not a multiple of world_size, or a single process compresses gradients.
    """
    if images % world_size:
        raise ValueError(
            f"train: schedule.batch_size / accumulate must be a multiple of the {world_size} processes, "
            f"got {images}; change --schedule.batch-size or the number of processes"
        )
    if compression != "none" and world_size == 1:
        raise ValueError(
            f"train: runtime.grad_compression must be none for one process, which sends no gradients, got "
            f"{compression}; leave it out or start several by torchrun"
        )


def own_device(device: torch.device | str | None, local_rank: int, several: bool) -> torch.device:
    """The device of a process: on a machine with GPUs, the GPU with index `local_rank`.

    Args:
        device: "cpu", "cuda" or a torch.device; None takes a GPU if there is one.
        local_rank: rank of the process on its machine.
        several: whether the run has other processes.
    Raises: ValueError for a GPU that does not exist or that several processes would share.
    """
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"train: device must be one torch can see, got {device} without a GPU; pass --device cpu")
    if several and device.index is not None:
        raise ValueError(
            f"train: device must be cuda for several processes, each of which takes its own, got {device}; "
            "pass --device cuda, and CUDA_VISIBLE_DEVICES to choose among them"
        )
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"train: a process must have a GPU of its own, got LOCAL_RANK {index} with {torch.cuda.device_count()} "
            "GPUs on this machine; lower torchrun's --nproc-per-node or pass --device cpu"
        )
    return torch.device("cuda", index)


def _join(backend: str, timeout: float) -> None:
    """Initialises the process group under a prefix of the store that is unique to this start.

    torchrun keeps its store when it restarts the processes, including the addresses of the killed ones. Without the
    prefix, a process that restarts before the others would connect to these addresses.
    """
    limit = datetime.timedelta(minutes=timeout)
    store, rank, world_size = next(rendezvous("env://", timeout=limit))
    prefix = _rendezvous_key(store, rank, world_size, timeout)
    prefixed = dist.PrefixStore(prefix, store)
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size, timeout=limit)


def _rendezvous_key(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """Rendezvous key, unique to this restart: rank 0 generates it and sends it to every running process."""
    token = uuid.uuid4().hex
    store.set(f"fastkd/token/{rank}", token)
    if rank > 0:
        key = store.get(f"fastkd/key/{token}").decode()  # blocks until rank 0 has set it
        store.set(f"fastkd/received/{key}/{rank}", "")
        return key
    end, missing = time.monotonic() + 60 * timeout, set(range(1, world_size))
    while missing:
        for other in missing:
            if store.check([f"fastkd/token/{other}"]):  # perhaps of a killed process, until the new one replaces it
                store.set(f"fastkd/key/{store.get(f'fastkd/token/{other}').decode()}", token)
        missing = {other for other in missing if not store.check([f"fastkd/received/{token}/{other}"])}
        if missing and time.monotonic() > end:
            raise TimeoutError(
                f"train: {world_size} processes must start within {timeout:g} minutes, got none of rank "
                f"{sorted(missing)}; look at their output or raise --runtime.timeout"
            )
        time.sleep(0.02)
    return token


@contextlib.contextmanager
def processes(device: torch.device | str | None = None, timeout: float = TIMEOUT) -> Iterator[Processes]:
    """Joins the process group that torchrun's environment variables describe; destroys it at the end of the block.

    An existing process group is used and not destroyed. The backend is gloo on the CPU; with GPUs, nccl for CUDA
    tensors and gloo for CPU tensors.

    Args:
        device: "cpu", "cuda" or a torch.device; None takes a GPU if there is one, the one numbered LOCAL_RANK.
        timeout: minutes a process waits for the others, > 0.
    Raises: ValueError for a device that does not exist or that several processes would share; TimeoutError or torch's
        DistStoreError if a process does not start in time.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    device = own_device(device, int(os.environ.get("LOCAL_RANK", 0)), several)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = several and not dist.is_initialized()
    if started:
        _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout)
    try:
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size(), device)
        else:
            yield Processes(0, 1, device)
    finally:
        if started:
            dist.destroy_process_group()
