"""Context managers for a second forward pass through a host's modules without side effects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def unrecorded_statistics(module: nn.Module) -> Iterator[None]:
    """Within the context batch norms in train mode use batch statistics but do not update their buffers."""
    tracking = [
        part for part in module.modules() if isinstance(part, _BatchNorm) and part.training and part.track_running_stats
    ]
    for part in tracking:
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in tracking:
            part.track_running_stats = True


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
    """Restores the states of the random generators after the block."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
