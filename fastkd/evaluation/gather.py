"""Exchanges JSON values between the processes of a torch.distributed run, without pickle."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from fastkd.ops._support.normalizer import is_distributed


def _device() -> torch.device:
    """Device of the exchanged tensors: the CPU if the group has gloo, else the GPU, as nccl needs GPU tensors."""
    if "cpu:" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def all_gather_json(value: Any) -> list[Any]:
    """Every process's JSON-safe `value`, in order of rank; a one-element list outside a distributed run.

    Called by all ranks. Values are sent as bytes padded to the longest, so that their sizes may differ between ranks.
    """
    if not is_distributed():
        return [value]
    device = _device()
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([payload.numel()], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    sizes = [int(item) for item in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return [json.loads(data[:size].cpu().numpy().tobytes()) for data, size in zip(received, sizes)]


def broadcast_json(value: Any) -> Any:
    """Rank 0's JSON-safe `value` on every rank (the value itself outside a distributed run); called by all ranks."""
    if not is_distributed():
        return value
    return all_gather_json(value if dist.get_rank() == 0 else None)[0]
