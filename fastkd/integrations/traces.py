"""Context managers for a second forward pass through a host's modules without side effects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def unrecorded_statistics(module: nn.Module) -> Iterator[None]:
    """Within the context modules in train mode do not update their buffers; batch norms use batch statistics.

    Norms with a forward pass of their own write their statistics by hand: their modules get copies of the buffers.
    """
    tracking: list[Any] = []
    others: list[tuple[nn.Module, dict[str, Any]]] = []
    for part in module.modules():
        if part.training and type(part).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            tracking += [part] if part.track_running_stats else []
        elif part.training and part._buffers:
            others.append((part, dict(part._buffers)))
    for part in tracking:
        part.track_running_stats = False
    for part, buffers in others:
        part._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for part in tracking:
            part.track_running_stats = True
        for part, buffers in others:
            part._buffers.update(buffers)


@contextlib.contextmanager
def replaced_module(parent: nn.Module, **replacements: nn.Module) -> Iterator[None]:
    """Replaces children of `parent`, by name, within the context."""
    before = {name: parent._modules[name] for name in replacements}
    parent._modules.update(replacements)
    try:
        yield
    finally:
        parent._modules.update(before)


class Replay(nn.Module):
    """A module that returns a recorded output for any arguments."""

    def __init__(self, output: object):
        super().__init__()
        self.output = output

    def forward(self, *args: object, **kwargs: object) -> object:
        """The recorded output."""
        return self.output


@contextlib.contextmanager
def preserved_randomness(device: torch.device) -> Iterator[None]:
    """Restores the states of the random generators of the CPU and of `device` after the block."""
    accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)
    arguments = () if device.type == "mps" else (device,)  # MPS has a single device
    state = None if accelerator is None else accelerator.get_rng_state(*arguments)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if accelerator is not None:
            accelerator.set_rng_state(state, *arguments)
