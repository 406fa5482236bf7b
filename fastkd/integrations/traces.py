"""Second passes through a host's modules that leave no trace in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def unrecorded_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms in train mode use the statistics of the batch and record nothing, num_batches_tracked included."""
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
    """Children of `parent`, by name, replaced for the time of the block."""
    before = {name: parent._modules[name] for name in replacements}
    parent._modules.update(replacements)
    try:
        yield
    finally:
        parent._modules.update(before)


class Replay(nn.Module):
    """A module that gives back one recorded output, whatever it is called with."""

    def __init__(self, output: object):
        super().__init__()
        self.output = output

    def forward(self, *args: object, **kwargs: object) -> object:
        """The recorded output."""
        return self.output


@contextlib.contextmanager
def preserved_randomness(device: torch.device) -> Iterator[None]:
    """The random numbers drawn inside do not advance the host's generators."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
