"""The Triton kernels of project_levels under Triton's interpreter, on the CPU.

tests/ops/test_project_levels.py runs this file in a process of its own, with TRITON_INTERPRET=1, as
attention_triton_cases.py is run.
"""

import sys

import attention_triton_cases as shared
import torch
from kernels import channels_last, contiguous, strided
from tolerance import assert_no_worse

from fastkd.ops.project_levels import order_of, project_levels_reference
from fastkd.ops.triton import configurations, plan, projection
from fastkd.ops.triton.configurations import Card, Tiles

SIZES = [(5, 7), (1, 3), (1, 1)]
FEW = (2, 5, 6, SIZES)  # images, channels, outputs, levels
BLOCKS = (2, 19, 18, [(3, 9), (0, 2), (2, 2)])  # more channels and outputs than a block
EMPTY = {"no images": (0, 5, 6, SIZES), "no cells": (2, 5, 6, [(0, 3), (4, 0)]), "one cell": (1, 1, 1, [(1, 1)])}
SMALL = Tiles(16, 16, 16, 4, 1)
CARD = Card(8, 3)  # few shares of several tiles
CASES = {}


def draw(images, channels, outputs, sizes, *, dtype=torch.bfloat16, layout=contiguous):
    """Levels, weight, bias and a gradient of the results."""
    levels = [layout(torch.randn(images, channels, *size).to(dtype)) for size in sizes]
    weight = (torch.randn(outputs, channels) * channels**-0.5).to(dtype)
    return (
        levels,
        weight,
        torch.randn(outputs).to(dtype),
        [layout(torch.randn(images, outputs, *size).to(dtype)) for size in sizes],
    )


def by_torch(levels, weight, bias, grads, dtype):
    """Results, and gradients of levels, weight and bias, of plain torch; a pyramid as one tensor."""
    levels = [level.to(dtype).requires_grad_() for level in levels]
    weight, bias = weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()
    results = project_levels_reference(levels, weight, bias)
    gradients = torch.autograd.grad(results, [*levels, weight, bias], [grad.to(dtype) for grad in grads])
    return [shared.flat(results).detach(), shared.flat(gradients[: len(levels)]), *gradients[-2:]]


def by_triton(levels, weight, bias, grads, card=CARD):
    launches, results = projection.plan_projection(levels, weight, bias, card)
    plan.run(launches, weight.device)
    launches, found = projection.plan_backward(grads, levels, weight, True, True, True, card)
    plan.run(launches, weight.device)
    pyramids = (results, found[: len(levels)])
    assert all(one.is_contiguous(memory_format=order_of(levels)) for pyramid in pyramids for one in pyramid)
    return [*map(shared.flat, pyramids), *found[len(levels) :]]


def check(*drawn):
    dtype = drawn[0][0].dtype
    exact = by_torch(*drawn, torch.float64)
    ours = by_triton(*drawn)
    assert_no_worse(ours, by_torch(*drawn, dtype), exact)
    return ours


def add_case(name, *shape, **how):
    CASES[name] = lambda: check(*draw(*shape, **how))


for dtype in (torch.bfloat16, torch.float16):
    for layout in (contiguous, channels_last):
        add_case(f"few {str(dtype)[6:]} {layout.__name__}", *FEW, dtype=dtype, layout=layout)
        add_case(f"blocks {str(dtype)[6:]} {layout.__name__}", *BLOCKS, dtype=dtype, layout=layout)
add_case("strided levels", *FEW, layout=strided)
for name, shape in EMPTY.items():
    add_case(name, *shape)


def case(name):
    def keep(function):
        CASES[name] = function
        return function

    return keep


@case("levels of both memory orders")
def both_orders():
    levels, weight, bias, grads = draw(*FEW)
    check([channels_last(levels[0]), *levels[1:]], weight, bias, [grads[0], channels_last(grads[1]), grads[2]])


@case("offsets of 64 bits")
def wide_offsets():
    before, plan.NARROW_LIMIT = plan.NARROW_LIMIT, 0
    try:
        for layout in (contiguous, channels_last):
            check(*draw(*FEW, layout=layout))
    finally:
        plan.NARROW_LIMIT = before


@case("same bits in every order")
def same_bits():
    drawn, found = draw(*BLOCKS, layout=channels_last), []
    for shared.SEED[0] in (1, 2):
        found.append(by_triton(*drawn))
    assert all(torch.equal(one, other) for one, other in zip(*found))


@case("some gradients only")
def some_gradients():
    levels, weight, bias, grads = draw(*BLOCKS, layout=channels_last)
    _, *everything = by_triton(levels, weight, bias, grads)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        launches, found = projection.plan_backward(grads, levels, weight, *wanted, CARD)
        plan.run(launches, weight.device)
        found = [shared.flat(found[: len(levels)]), *found[len(levels) :]] if wanted[0] else found
        expected = [one for one, want in zip(everything, wanted, strict=True) if want]
        assert len(found) == len(expected) and all(map(torch.equal, found, expected)), wanted


@case("nan comes through")
def nan():
    levels, weight, bias, _ = draw(*FEW)
    levels[0][1, 2, 3, 4] = torch.nan
    launches, results = projection.plan_projection(levels, weight, bias, CARD)
    plan.run(launches, weight.device)
    assert results[0][1, :, 3, 4].isnan().all() and shared.flat(results).isnan().sum() == len(weight)


@case("arguments that do not fit")
def misfits():
    levels, weight, bias, grads = draw(*FEW)
    narrow = [levels[0][:, 1:], *levels[1:]]
    for given in (
        (narrow, weight, bias),
        (levels, weight.float(), bias),
        ([level.float() for level in levels], weight.float(), bias.float()),
    ):
        shared.refuses(lambda given=given: projection.plan_projection(*given, CARD), "arguments must fit")
    shared.refuses(lambda: projection.plan_projection(levels, weight, bias[1:], CARD), "bias must be")
    for wrong in (grads[:2], [grads[0][:1], *grads[1:]]):
        shared.refuses(
            lambda wrong=wrong: projection.plan_backward(wrong, levels, weight, True, True, True, CARD),
            "arguments must fit",
        )


def small_blocks():
    """Blocks so small that tiny shapes have several."""
    configurations.projection = configurations.projection_weight = lambda *arguments: SMALL
    shared.CASES, shared.small_blocks = CASES, lambda: None


if __name__ == "__main__":
    small_blocks()
    shared.main(sys.argv[1], sys.argv[2:])
