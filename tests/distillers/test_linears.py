"""Linears of few rows whose biases get their gradients together: results and gradients of plain torch."""

import torch
from torch import nn

from fastkd.distillers.linears import Biases


def test_biases_are_those_of_the_linears():
    layers = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    biases = Biases([layers[0], layers[2]], 8)
    ours, theirs = biases.apply_all(layers, x), layers(x)
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(y.square().sum(), [x, *layers.parameters()]) for y in (ours, theirs))
    torch.testing.assert_close(found, expected)
