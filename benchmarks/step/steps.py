"""Forward and backward of a call, as timed by `benchmarks.ops`, and the comparison of two such calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

# maximum norm of the difference relative to the norm of plain torch's float32 result; for flags, fraction of flags
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def tensors(value) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


class Step:
    """Forward and, if any argument requires a gradient, backward of a call.

    Output gradients are random, in the memory format of each output, and drawn beforehand.
    """

    def __init__(self, function: Callable, arguments: tuple, seed: int = 0):
        self.function, self.arguments = function, arguments
        self.wanted = [leaf for leaf in tensors(arguments) if leaf.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        self.cotangents = []
        for result in tensors(function(*arguments)):
            if result.requires_grad:
                drawn = torch.randn(result.shape, generator=generator)
                self.cotangents.append(torch.empty_like(result, requires_grad=False).copy_(drawn))

    def __call__(self) -> list[Tensor]:
        """Results, then gradients."""
        results = tensors(self.function(*self.arguments))
        roots = [result for result in results if result.requires_grad]
        gradients = torch.autograd.grad(roots, self.wanted, self.cotangents) if roots else ()
        if results[0].is_cuda:
            torch.cuda.synchronize(results[0].device)
        return [*results, *gradients]


def assert_same(actual: Step, expected: Step, dtype: torch.dtype) -> None:
    """Raise unless results and gradients agree up to rounding."""
    for ours, theirs in zip(actual(), expected(), strict=True):
        assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)}, plain torch gives {tuple(theirs.shape)}"
        if theirs.dtype == torch.bool:
            error = (ours != theirs).double().mean()
        else:
            difference, scale = ours.detach().double() - theirs.detach(), theirs.detach().double().norm()
            error = difference.norm() / scale if scale > 0 else difference.norm()
        assert error <= ALLOWED[dtype], f"relative difference from plain torch {error:.1e}"
