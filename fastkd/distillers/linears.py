"""Linears of few rows, whose biases get their gradients together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Biases:
    """The biases of linears that all see the same number of rows, each as often as there are rows: views of one tensor.

    A product adds such a matrix as it is, and its gradient is that of the result: one sum over the rows gives the
    gradients of all biases.

    Args:
        linears: with biases of one dtype.
        rows: of all their arguments.
    """

    def __init__(self, linears: Sequence[nn.Linear], rows: int):
        self.linears = list(linears)
        biases = torch.cat([linear.bias for linear in linears]).expand(rows, -1)
        self.biases = biases.split([linear.out_features for linear in linears], dim=1)

    def of(self, linear: nn.Linear) -> Tensor:
        """The bias of one of these linears, once for each row: [rows, outputs]."""
        return next(bias for own, bias in zip(self.linears, self.biases) if own is linear)

    def apply(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """The linear, one of these, of x [..., inputs]."""
        return torch.addmm(self.of(linear), x.flatten(0, -2), linear.weight.t()).unflatten(0, x.shape[:-1])

    def apply_all(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        """A sequence of these linears and of modules without parameters."""
        for layer in layers:
            x = self.apply(layer, x) if isinstance(layer, nn.Linear) else layer(x)
        return x
