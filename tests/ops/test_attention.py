"""instance_attention and attention_mass: the kernels of every instruction set against the references."""

import math
import random

import pytest
import torch
from kernels import (
    DTYPES,
    channels_last,
    close_to_float64,
    contiguous,
    convert,
    expanded,
    results_and_gradients,
    strided,
    transposed,
)
from tolerance import assert_no_worse

from fastkd.ops import attention_mass, instance_attention
from fastkd.ops.attention_mass import attention_mass_reference
from fastkd.ops.instance_attention import absorbing_is_cheaper, instance_attention_reference

LEVELS = [(13, 17), (5, 8), (1, 3), (1, 1)]
# images, heads, queries, key depth, channels, value depth, levels
FEW = (2, 3, 2, 5, 7, 4, LEVELS)  # absorbed queries
MANY = (2, 2, 37, 6, 10, 3, LEVELS)  # projected keys
WHOLE = (1, 2, 33, 16, 32, 16, [(16, 27)])  # whole vectors and panels everywhere, three tiles
LONG = (1, 1, 3, 2, 4, 2, [(70, 90), (20, 30)])  # several splits
BROAD = (2, 2, 9, 4, 5, 3, [(60, 50), (9, 7)])  # work for several threads
SHAPES = {"few": FEW, "many": MANY, "whole": WHOLE, "long": LONG}


def draw(images, heads, count, depth, channels, value_depth, sizes, layout=contiguous, other=None, mask=True):
    """Arguments of instance_attention, float32 leaves, values laid out by `other`; `mask`: the first image smaller."""
    queries = torch.randn(images, heads, count, depth) * max(depth, 1) ** -0.5
    levels = [layout(torch.randn(images, channels, *size)) for size in sizes]
    weight = torch.randn(heads * depth, channels) * max(channels, 1) ** -0.5
    # Weak biases: where one cell takes all, gradients are differences of nearly equal numbers, which plain torch and
    # we round independently, and the largest of few errors says little (`test_fuzz` takes the largest of many).
    rows, columns = ([torch.randn(images, heads, count, size[axis]) / 2 for size in sizes] for axis in (0, 1))
    if mask and images:
        for table in rows + columns:
            table[0, ..., table.shape[3] * 3 // 4 + 1 :] = -math.inf
    values = [(other or layout)(torch.randn(images, heads * value_depth, *size)) for size in sizes]
    for tensor in (queries, weight, *rows, *columns, *values):
        tensor.requires_grad_()
    return [queries, levels, weight, rows, columns, values]


def for_mass(arguments, given=True, temperature=1.0):
    """Arguments of attention_mass: about half of the queries, and the logsumexp where given."""
    queries, levels, weight, rows, columns = convert(arguments[:5], arguments[0].dtype)
    chosen = torch.rand(queries.shape[0], queries.shape[2]) < 0.5
    logsumexp = instance_attention_reference(*arguments)[1] if given else None
    return [queries, levels, weight, rows, columns, chosen, logsumexp, temperature]


def check_draws(op, reference, make, count=4):
    """Like kernels.check, with the results of several draws as one: one small result can be exact by luck."""
    everything = []
    for seed in range(count):
        torch.manual_seed(seed)
        arguments = make()
        double = convert(arguments, torch.float64)
        runs = ((op, arguments), (reference, arguments), (reference, double))
        found = [results_and_gradients(one, given) for one, given in runs]
        everything.append([[*results, *gradients] for results, gradients in found])
    for side in zip(*([torch.stack(same) for same in zip(*runs)] for runs in zip(*everything))):
        assert_no_worse(*side)


def test_both_ways_to_the_logits_are_covered():
    chosen = {name: absorbing_is_cheaper(draw(*shape)[0], shape[4]) for name, shape in SHAPES.items()}
    assert chosen == {"few": True, "many": False, "whole": False, "long": True}
    assert absorbing_is_cheaper(torch.empty(1, 8, 36, 32), 256)
    assert not absorbing_is_cheaper(torch.empty(1, 8, 37, 32), 256)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_no_worse_than_plain(capability, shape, layout, dtype):
    count = 24 if shape is FEW else 3  # the fewer numbers, the more of them are exact by luck
    check_draws(
        instance_attention, instance_attention_reference, lambda: convert(draw(*shape, layout=layout), dtype), count
    )


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_mass_is_no_worse_than_plain(capability, shape, dtype):

    def whole(op):  # the pyramid as one result: the rule measures errors by the largest value of a result
        return lambda *arguments: torch.cat([level.flatten(2) for level in op(*arguments)], dim=2)

    for given, temperature in ((True, 1.0), (False, 1.0), (False, 2.5)):
        check_draws(
            whole(attention_mass),
            whole(attention_mass_reference),
            lambda given=given, temperature=temperature: for_mass(convert(draw(*shape), dtype), given, temperature),
            count=24,  # largest errors of few numbers: many draws, or plain torch's is small by luck
        )


@pytest.mark.sampled
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_float64(capability, shape, layout):
    arguments = draw(*shape, layout=layout)
    close_to_float64(instance_attention, instance_attention_reference, arguments)
    for given, temperature in ((True, 1.0), (False, 0.7)):
        mass_arguments = for_mass(convert(arguments, torch.float64), given, temperature)
        close_to_float64(attention_mass, attention_mass_reference, mass_arguments)


@pytest.mark.parametrize("layouts", [(contiguous, channels_last), (channels_last, strided), (expanded, transposed)])
@pytest.mark.parametrize("shape", [FEW, MANY], ids=["few", "many"])
def test_mixed_and_strided_layouts(shape, layouts):
    close_to_float64(instance_attention, instance_attention_reference, draw(*shape, *layouts))


def test_levels_of_both_memory_orders_in_one_tile():
    queries, levels, weight, rows, columns, values = draw(*MANY)
    levels = [layout(level) for layout, level in zip([channels_last, contiguous] * 2, levels)]
    values = [layout(value.detach()).requires_grad_() for layout, value in zip([contiguous, channels_last] * 2, values)]
    arguments = [queries, levels, weight, rows, columns, values]
    close_to_float64(instance_attention, instance_attention_reference, arguments)
    gradients = torch.autograd.grad(instance_attention(*arguments)[0].sum(), values)
    assert [one.stride() for one in gradients] == [value.stride() for value in values]


EMPTY = {
    "no images": (0, 2, 3, 4, 5, 2, LEVELS),
    "no queries": (2, 2, 0, 4, 5, 2, LEVELS),
    "no cells": (2, 2, 3, 4, 5, 2, [(0, 3), (4, 0)]),
    "an empty level": (2, 2, 3, 4, 5, 2, [(3, 4), (0, 2), (2, 2)]),
    "no depth": (2, 2, 3, 0, 5, 2, LEVELS),
    "no values": (2, 2, 3, 4, 5, 0, LEVELS),
    "no channels": (2, 2, 3, 4, 0, 2, LEVELS),
    "one cell": (1, 1, 1, 1, 1, 1, [(1, 1)]),
}


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY.keys())
def test_empty_shapes(capability, shape):
    arguments = draw(*shape, mask=False)
    close_to_float64(instance_attention, instance_attention_reference, arguments)
    if shape[0] * shape[2]:
        close_to_float64(attention_mass, attention_mass_reference, for_mass(convert(arguments, torch.float64), False))


def test_mass_without_chosen_queries_is_zero(capability):
    arguments = for_mass(draw(*FEW))
    arguments[5] = torch.zeros_like(arguments[5])
    assert all(not level.any() and level.dtype == torch.float32 for level in attention_mass(*arguments))


def test_masked_cells_get_nothing(capability):
    arguments = draw(*MANY)
    gradients = torch.autograd.grad(instance_attention(*arguments)[0].square().sum(), arguments[5])
    masses = attention_mass(*for_mass(arguments))
    for size, gradient, mass in zip(LEVELS, gradients, masses):
        rows, columns = (side * 3 // 4 + 1 for side in size)
        for level in (gradient, mass):
            assert not level[0, :, rows:].any() and not level[0, :, :, columns:].any()
            assert level[1].any()


def test_rows_masked_for_one_query_only_stay_in(capability):
    arguments = draw(*FEW, mask=False)
    with torch.no_grad():
        arguments[3][0][:, 0, 0, 3:9] = -math.inf
        arguments[4][0][1, :, 1, :5] = -math.inf
        arguments[3][1][0, :, :, 1:3] = -math.inf  # between open rows
    close_to_float64(instance_attention, instance_attention_reference, arguments)


def test_a_query_that_may_attend_to_nothing_is_nan_alone(capability):
    arguments = draw(*FEW, mask=False)
    with torch.no_grad():
        for table in arguments[3]:
            table[1, 2, 0] = -math.inf
    output, logsumexp = instance_attention(*arguments)
    expected, expected_logsumexp = instance_attention_reference(*arguments)
    torch.testing.assert_close((output, logsumexp), (expected, expected_logsumexp), equal_nan=True)
    assert output[1, 2, 0].isnan().all() and output.isnan().sum() == output.shape[3]


def test_nan_comes_through(capability):
    arguments = draw(*MANY, mask=False)
    arguments[1][0][1, 2, 3, 4] = math.nan
    output, logsumexp = instance_attention(*arguments)
    assert output[1].isnan().all() and logsumexp[1].isnan().all() and output[0].isfinite().all()


def test_large_logits(capability):
    """Logits of several thousand: one cell has probability 1."""

    def large():
        arguments = draw(*MANY)
        with torch.no_grad():
            arguments[0] *= 3000
        return arguments

    check_draws(instance_attention, instance_attention_reference, large, count=8)


@pytest.mark.parametrize("wanted", [(0,), (2,), (3,), (4,), (5,), (0, 5)])
def test_gradients_of_some_arguments_only(wanted):
    arguments = draw(*MANY)

    def tensors(argument):
        return argument if isinstance(argument, list) else [argument]

    leaves = [tensor for place in wanted for tensor in tensors(arguments[place])]
    expected = torch.autograd.grad(instance_attention(*arguments)[0].square().sum(), leaves)
    for place in (0, 2, 3, 4, 5):
        for tensor in tensors(arguments[place]):
            tensor.requires_grad_(place in wanted)
    actual = torch.autograd.grad(instance_attention(*arguments)[0].square().sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected))


@pytest.mark.sampled
@pytest.mark.parametrize("layout", [contiguous, channels_last, strided, expanded])
@pytest.mark.parametrize("shape", [(2, 2, 2, 3, 4, 2), (2, 2, 5, 2, 3, 3)], ids=["absorbed", "projected"])
def test_gradcheck(capability, shape, layout):
    queries, levels, weight, rows, columns, values = convert(draw(*shape, [(3, 2), (1, 2)]), torch.float64)

    def op(queries, weight, *others):
        bent = [layout(value) for value in others[4:]]
        return instance_attention(queries, levels, weight, others[:2], others[2:4], bent)[0]

    assert torch.autograd.gradcheck(op, (queries, weight, *rows, *columns, *values), fast_mode=True)


def test_autocast_and_mixed_dtypes():
    """Under autocast maps come in bfloat16 and tables in float32: each argument counts with the values it has."""
    queries, levels, weight, rows, columns, values = draw(*MANY)
    mixed = [convert(queries, torch.bfloat16), convert(levels, torch.bfloat16), weight, rows, columns,
             convert(values, torch.float16)]  # fmt: skip
    expected = instance_attention(*convert(mixed, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        output, logsumexp = instance_attention(*mixed)
        mass = attention_mass(*mixed[:5], torch.ones(2, 37, dtype=torch.bool), logsumexp)
    assert output.dtype == torch.bfloat16 and logsumexp.dtype == mass[0].dtype == torch.float32
    assert torch.equal(output, expected[0].bfloat16()) and torch.equal(logsumexp, expected[1])
    leaves = [mixed[0], weight, rows[0], mixed[5][0]]
    assert [one.dtype for one in torch.autograd.grad(output.sum(), leaves)] == [one.dtype for one in leaves]


def test_logsumexp_has_no_gradient():
    output, logsumexp = instance_attention(*draw(*MANY))
    assert output.requires_grad and not logsumexp.requires_grad


def draw_any(choose: random.Random):
    """Small arguments of any kind: shapes, dtypes, layouts, padding."""
    # Of a single cell the exact gradients are 0: there would be nothing to measure errors by.
    sizes = [(choose.randint(2, 6), choose.randint(2, 7)), (choose.randint(1, 2), choose.randint(0, 3))]
    sizes = sizes[: choose.randint(1, 2)]
    depths = [choose.randint(1, 9) for _ in range(3)]
    shape = [choose.randint(1, 2), choose.randint(1, 3), choose.choice([0, 1, 2, 5, 9]), *depths]
    layouts = [choose.choice([contiguous, channels_last, strided]) for _ in range(2)]
    arguments = draw(*shape, sizes, *layouts, mask=choose.random() < 0.5)
    return convert(arguments, choose.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]))


def draw_wide(choose):
    """Without float16, which cannot represent the extreme values."""
    return convert(draw_any(choose), choose.choice([torch.float32, torch.bfloat16]))


def draw_mass(choose):
    return for_mass(draw_wide(choose), *choose.choice([(True, 1.0), (False, 1.0), (False, 2.0)]))


def changed(place, value):
    arguments = draw(*FEW)
    arguments[place] = value(arguments[place]) if callable(value) else value
    return arguments


def float8(values):
    return [value.to(torch.float8_e5m2) for value in values]


BAD = [
    (ValueError, r"queries must be \[B, G, N, d\]", lambda: changed(0, lambda q: q[0])),
    (TypeError, r"queries must be a tensor", lambda: changed(0, 3)),
    (ValueError, r"queries must have at least one head", lambda: changed(0, lambda q: q[:, :0])),
    (ValueError, r"levels must hold the 1 images", lambda: changed(0, lambda q: q[:1])),
    (TypeError, r"levels must be a list", lambda: changed(1, lambda levels: levels[0])),
    (ValueError, r"levels\[1\] must be \[2, 7\]", lambda: changed(1, lambda levels: [levels[0], levels[1][:, 1:]])),
    (ValueError, r"key_weight must be \[15, 7\], got \[15, 6\]", lambda: changed(2, lambda w: w[:, 1:])),
    (ValueError, r"key_weight must be float64 if and only if", lambda: changed(2, lambda w: w.double())),
    (ValueError, r"key_weight must be on cpu", lambda: changed(2, lambda w: w.to("meta"))),
    (TypeError, r"row_bias must be a list", lambda: changed(3, lambda tables: tables[0])),
    (ValueError, r"row_bias must hold 4 tables, got 1", lambda: changed(3, lambda tables: tables[:1])),
    (ValueError, r"column_bias\[0\] must be \[2, 3, 2, 17\]", lambda: changed(4, lambda t: [t[0][..., 1:], *t[1:]])),
    (ValueError, r"values must have the images and cells", lambda: changed(5, lambda v: v[:2])),
    (ValueError, r"values must have a multiple of 3", lambda: changed(5, lambda v: [one[:, 1:] for one in v])),
    (ValueError, r"values\[0\] must be float32, .* got torch.float8", lambda: changed(5, float8)),
]  # fmt: skip


@pytest.mark.parametrize("error, message, make", BAD, ids=[case[1][:40] for case in BAD])
def test_bad_arguments(error, message, make):
    with pytest.raises(error, match=f"^instance_attention: {message}"):
        instance_attention(*make())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, "1"])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match=r"^attention_mass: temperature must be > 0 and finite, got "):
        attention_mass(*for_mass(draw(*FEW), False)[:7], temperature)


def test_bad_choice_and_logsumexp():
    arguments = for_mass(draw(*FEW))
    chosen, logsumexp = arguments[5:7]
    for bad in (chosen.int(), chosen[:1], chosen.to("meta"), None):
        with pytest.raises((TypeError, ValueError), match=r"^attention_mass: chosen must be .*; "):
            attention_mass(*arguments[:5], bad)
    for bad in (logsumexp[:1], logsumexp.double(), logsumexp.to("meta"), 3):
        with pytest.raises((TypeError, ValueError), match=r"^attention_mass: logsumexp must be .*; "):
            attention_mass(*arguments[:5], chosen, bad)
