"""The convolutions that levels share: results and gradients of plain torch, and gradients added up."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastkd.distillers.linears import Biases
from fastkd.distillers.towers import normed_tower, plain_tower, share

SIZES = ((6, 9), (3, 5), (1, 1))


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def refined(level, row, convs):
    level = F.relu(level + row[:, :, None, None]) if row is not None else F.relu(level)
    for conv in convs[:-1]:
        level = F.relu(F.group_norm(conv(level), 1))
    return F.group_norm(convs[-1](level), 1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["plain", "normed", "normed, shared"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_towers_are_their_convolutions(kind, recompute, order):
    torch.manual_seed(0)
    convs = [nn.Conv2d(*sizes, 3, padding=1).double() for sizes in ((4, 6), (6, 6), (6, 4))]
    levels = [drawn(2, 4, *size) for size in SIZES]
    given = [level.contiguous(memory_format=order) for level in levels]
    shared = drawn(len(SIZES), 2, 4) if kind == "normed, shared" else None
    if kind == "plain":
        ours = plain_tower(given, convs, recompute=recompute)
        theirs = [convs[2](F.relu(convs[1](F.relu(convs[0](level))))) for level in given]
    else:
        ours = normed_tower(given, shared, convs, order=order, recompute=recompute)
        rows = [None] * len(SIZES) if shared is None else shared.unbind()
        theirs = [refined(level, row, convs) for level, row in zip(given, rows)]
        assert all(level.is_contiguous(memory_format=order) for level in ours)
    torch.testing.assert_close(ours, theirs)
    weights = [torch.randn_like(level) for level in theirs]
    wanted = [*levels, *(p for conv in convs for p in conv.parameters()), *([shared] if shared is not None else [])]
    found, expected = (torch.autograd.grad(results, wanted, weights) for results in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


def test_gradients_of_shared_levels_add_up():
    levels = [drawn(2, 3), drawn(4)]
    first, second, third = share(levels, 3)
    (first[0].sum() + 2 * second[0].sum() + 3 * third[1].sum()).backward()
    assert levels[0].grad.eq(3).all() and levels[1].grad.eq(3).all()
    assert share([level.detach() for level in levels], 2)[1][0].grad_fn is None


def test_biases_are_those_of_the_linears():
    layers = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = drawn(2, 4, 3)
    biases = Biases([layers[0], layers[2]], 8)
    ours, theirs = biases.apply_all(layers, x), layers(x)
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(y.square().sum(), [x, *layers.parameters()]) for y in (ours, theirs))
    torch.testing.assert_close(found, expected)
