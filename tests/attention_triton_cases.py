"""The Triton kernels of instance_attention and attention_mass under Triton's interpreter, on the CPU.

tests/ops/test_attention_triton.py runs this file in a separate process with TRITON_INTERPRET=1, which Triton reads at
import. Every case runs with the programs of a launch in shuffled order; its error, if any, is written to a file.
"""

import dataclasses
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from draws import LONG
from kernels import channels_last, contiguous, strided
from tolerance import assert_no_worse
from triton_interpreter import SEED, keep_bfloat16_as_gpus_do, shuffle_programs

from fastkd.ops._support.coverage import flatten_pyramid
from fastkd.ops.attention_mass import attention_mass_reference
from fastkd.ops.instance_attention import instance_attention_reference
from fastkd.ops.triton import attention_backward, attention_forward, attention_mass, configurations, plan

LEVELS = [(5, 7), (1, 3), (1, 1)]
FEW = (2, 2, 3, 3, 5, 2, LEVELS)  # images, heads, queries, key depth, channels, value depth, levels
BLOCKS = (1, 2, 18, 4, 6, 3, [(3, 9), (2, 2)])  # more queries than a block
ONE_LEVEL = (1, 2, 3, 3, 5, 2, [(3, 5)])
CASES = {}


def small_blocks():
    """Small blocks and tiles, so that small shapes have several."""
    small = configurations.Configuration(16, 2, 8, 4, 1)
    configurations.mass = lambda shape, card: small
    configurations.backward = lambda shape, card: dataclasses.replace(
        small, single=not shape.projected and shape.count <= 16
    )
    configurations.forward = lambda shape, card: dataclasses.replace(small, pair=shape.projected)


def draw(images, heads, count, depth, channels, value_depth, sizes, *, dtype, projected, layouts=(contiguous,) * 2):
    """Arguments of the raw op: pyramids of dtype, the rest float32 (float64 of float64); the first image is smaller."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    depth = depth if projected else channels
    queries = torch.randn(images, heads, count, depth, dtype=wide) * max(depth, 1) ** -0.5
    weight = torch.randn(heads * depth, channels, dtype=wide) * max(channels, 1) ** -0.5 if projected else None
    levels = [layouts[0](torch.randn(images, channels, *size).to(dtype)) for size in sizes]
    values = [layouts[1](torch.randn(images, heads * value_depth, *size).to(dtype)) for size in sizes]
    tables = []
    for axis in (0, 1):  # views of one tensor, as in the decoder
        sides = [size[axis] for size in sizes]
        whole = torch.randn(images, heads, count, sum(sides), dtype=wide) / 2
        tables.append(list(whole.split(sides, dim=3)))
        if images and sides[0] > 3:
            tables[-1][0][0, ..., sides[0] * 3 // 4 + 1 :] = -math.inf
    return [queries, levels, weight, *tables, values]


def as_leaves(arguments, dtype=None):
    """The same values as leaves that require gradients (except levels), optionally in another dtype."""

    def leaf(value, wants=True):
        return (value.detach() if dtype is None else value.detach().to(dtype)).clone().requires_grad_(wants)

    queries, levels, weight, rows, columns, values = arguments
    weight = None if weight is None else leaf(weight)
    leaves = [leaf(queries), [leaf(level, False) for level in levels], weight]
    return leaves + [[leaf(value) for value in side] for side in (rows, columns, values)]


def projection(queries, weight):
    """The reference's key_weight: where keys are the cells, the identity for every head."""
    return torch.eye(queries.shape[3], dtype=queries.dtype).repeat(queries.shape[1], 1) if weight is None else weight


def reference(queries, levels, weight, rows, columns, values):
    return instance_attention_reference(queries, levels, projection(queries, weight), rows, columns, values)


def half_logits(queries, levels, weight, rows, columns):
    """Plain torch in the levels' half type, as autocast does it: products in that type, the softmax in float32."""
    dtype, heads = levels[0].dtype, queries.shape[1]
    cells = torch.cat([level.flatten(2) for level in levels], dim=2)  # [B, C, S]
    keys = cells[:, None] if weight is None else (weight.to(dtype) @ cells).unflatten(1, (heads, -1))
    bias = [(row[..., :, None] + column[..., None, :]).flatten(3) for row, column in zip(rows, columns)]
    return (queries.to(dtype) @ keys).float() + torch.cat(bias, dim=3)


def half(queries, levels, weight, rows, columns, values):
    logits = half_logits(queries, levels, weight, rows, columns)
    value = torch.cat([one.flatten(2) for one in values], dim=2).unflatten(1, (queries.shape[1], -1))
    output = logits.softmax(3).to(value.dtype) @ value.transpose(2, 3)
    return output.float(), logits.detach().logsumexp(3)


def plain_of(levels):
    return half if levels[0].dtype in (torch.bfloat16, torch.float16) else reference


def flat(tensors):
    """A pyramid's results as one: the rule measures errors by the largest value of a result."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def by_torch(op, arguments, cotangent):
    """Output, logsumexp and all gradients of plain torch."""
    queries, _, weight, rows, columns, values = arguments
    output, logsumexp = op(*arguments)
    wanted = [queries, *([] if weight is None else [weight]), *rows, *columns, *values]
    gradients = torch.autograd.grad(output, wanted, cotangent.to(output.dtype), allow_unused=True)
    gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients)]
    return grouped(output, logsumexp, gradients, len(rows), weight is not None)


def grouped(output, logsumexp, gradients, levels, projected):
    small = 2 if projected else 1
    parts = (gradients[small + index * levels : small + (index + 1) * levels] for index in range(3))
    return [output.detach(), logsumexp, *gradients[:small], *(flat(part) for part in parts)]


def by_triton(arguments, cotangent, card=None):
    queries, _, weight, rows, *_ = arguments
    launches, *results = attention_forward.plan_forward(*arguments, card=card)
    plan.run(launches, queries.device)
    output, logsumexp, normal = results
    launches, gather = attention_backward.plan_backward(
        cotangent.to(queries.dtype), output, normal, *arguments, True, True, card
    )
    plan.run(launches, queries.device)
    return grouped(output, logsumexp, gather(), len(rows), weight is not None)


def close(actual, plain, exact):
    """The tolerance rule; float64, where plain torch is exact, to 1e-12 of the largest value."""
    for one, other, truth in zip(actual, plain, exact, strict=True):
        if one.dtype == torch.float64:
            scale = max(truth.abs().nan_to_num().max().item() if truth.numel() else 0.0, 1e-30)
            torch.testing.assert_close(one, truth, rtol=1e-12, atol=1e-12 * scale, equal_nan=True)
        else:
            assert_no_worse(one, other, truth)


def check(*draws, card=None):
    """Forward, backward and mass against plain torch in the same types and float64.

    Several draws are compared as one: a few results of plain torch can be exact by chance.
    """
    everything = []
    for arguments in draws:
        shape = (*arguments[0].shape[:3], arguments[5][0].shape[1] // arguments[0].shape[1])
        cotangent = torch.randint(-8, 9, shape) / 8
        plain = by_torch(plain_of(arguments[1]), as_leaves(arguments), cotangent)
        exact = by_torch(reference, as_leaves(arguments, torch.float64), cotangent)
        ours = by_triton(arguments, cotangent, card)
        masses = masses_of(arguments, card)
        everything.append([[*one, *mass] for one, mass in zip((ours, plain, exact), masses)])
    close(*([torch.stack(same) for same in zip(*side)] for side in zip(*everything)))
    return everything[0][0]


def masses_of(arguments, card=None):
    """The masses of the kernels, plain torch and float64: with logsumexp, and without at another temperature."""
    queries, levels, weight, rows, columns, _ = arguments
    chosen = torch.rand(queries.shape[0], queries.shape[2]) < 0.6
    double = as_leaves(arguments, torch.float64)[:5]
    double[2] = projection(double[0], double[2])
    found = []
    for given, temperature in ((True, 1.0), (False, 2.0)):
        exact_logsumexp = reference(*as_leaves(arguments, torch.float64))[1] if given else None
        logsumexp = None if exact_logsumexp is None else exact_logsumexp.to(queries.dtype)
        exact = attention_mass_reference(*double, chosen, exact_logsumexp, temperature)
        if plain_of(levels) is half:
            logits = half_logits(queries, levels, weight, rows, columns) / temperature
            base = logits.logsumexp(3) if logsumexp is None else logsumexp
            plain = torch.where(chosen[:, None, :, None], (logits - base[..., None]).exp(), 0.0).sum(2)
        else:
            given_to_plain = (queries, levels, projection(queries, weight), rows, columns)
            plain = flatten_pyramid(attention_mass_reference(*given_to_plain, chosen, logsumexp, temperature))
        launches, masses = attention_mass.plan_mass(
            queries, levels, weight, rows, columns, chosen, logsumexp, temperature, card
        )
        plan.run(launches, queries.device)
        assert [mass.shape for mass in masses] == [one.shape for one in exact]
        found.append((flatten_pyramid(masses), plain, flatten_pyramid(exact)))
    return zip(*found)


def case(name):
    def keep(function):
        CASES[name] = function
        return function

    return keep


def add_case(name, *shape, **how):
    CASES[name] = lambda: check(draw(*shape, **how))


for projected in (False, True):
    form = "projected" if projected else "absorbed"
    for dtype, layout, count in (
        (torch.float32, contiguous, 1),
        (torch.float32, channels_last, 1),
        (torch.bfloat16, channels_last, 2),
        (torch.float16, contiguous, 2),
    ):
        how = dict(dtype=dtype, projected=projected, layouts=(layout,) * 2)
        name = f"{form} {str(dtype)[6:]} {layout.__name__}"
        CASES[name] = lambda how=how, count=count: check(*(draw(*FEW, **how) for _ in range(count)))
    for layouts in ((contiguous, channels_last), (channels_last, strided)):
        names = " ".join(layout.__name__ for layout in layouts)
        add_case(f"{form} blocks {names}", *BLOCKS, dtype=torch.float64, projected=projected, layouts=layouts)
    add_case(f"{form} blocks float32", *BLOCKS, dtype=torch.float32, projected=projected)

# Dtypes, layouts and sizes in pairs that other cases have with the other form: under --long only.
LATER = [
    "absorbed float32 channels_last",
    "absorbed float16 contiguous",
    "absorbed blocks contiguous channels_last",
    "projected float32 contiguous",
    "projected bfloat16 channels_last",
    "projected blocks channels_last strided",
    "projected blocks float32",  # sums of queries and weight in memory
]
EMPTY = {
    "no images": (0, *FEW[1:]),
    "no queries": (2, 2, 0, *FEW[3:]),
    "no cells": (*FEW[:6], [(0, 3), (4, 0)]),
    "an empty level": (*FEW[:6], [(3, 4), (0, 2), (2, 2)]),
    "no depth": (2, 2, 3, 0, 5, 2, [(2, 3)]),
    "no values": (2, 2, 3, 4, 5, 0, [(2, 3)]),
    "no channels": (2, 2, 3, 4, 0, 2, [(2, 3)]),
    "one cell": (1, 1, 1, 1, 1, 1, [(1, 1)]),
}
for name, shape in EMPTY.items():
    add_case(name, *shape, dtype=torch.float64, projected=True)


@case("levels of both memory orders")
def both_orders():
    arguments = draw(*FEW, dtype=torch.float64, projected=True)
    arguments[1] = [layout(one) for layout, one in zip([channels_last, contiguous, contiguous], arguments[1])]
    arguments[5] = [layout(one) for layout, one in zip([contiguous, channels_last, contiguous], arguments[5])]
    check(arguments)
    output, _, normal = attention_forward.instance_attention(*arguments)
    gradients = attention_backward.instance_attention_backward(output, output, normal, *arguments, False, True)
    assert [one.stride() for one in gradients] == [one.stride() for one in arguments[5]]


@case("parts of a few rows")
def parts_of_a_few_rows():
    arguments = draw(*FEW, dtype=torch.float64, projected=False)
    card = configurations.Card(8, 100)
    launches, *_ = attention_forward.plan_forward(*arguments, card=card)
    assert launches[0].arguments["parts"] > 3  # strips
    check(arguments, card=card)


@case("offsets of 64 bits")
def wide_offsets():
    before, plan.NARROW_LIMIT = plan.NARROW_LIMIT, 0
    try:
        for layout in (contiguous, channels_last):
            check(draw(*ONE_LEVEL, dtype=torch.float64, projected=layout is contiguous, layouts=(layout,) * 2))
    finally:
        plan.NARROW_LIMIT = before


@case("same bits in every order")
def same_bits():
    arguments = draw(*BLOCKS, dtype=torch.float32, projected=True)
    cotangent = torch.randn(1, 2, 18, 3)
    results = []
    for SEED[0] in (1, 2):
        results.append(by_triton(arguments, cotangent))
    assert all(torch.equal(one, other) for one, other in zip(*results))


@case("some gradients only")
def some_gradients():
    for shape, projected in ((FEW, True), (BLOCKS, False)):
        arguments = draw(*shape, dtype=torch.float32, projected=projected)
        output, _, normal = attention_forward.instance_attention(*arguments)
        given = (torch.ones_like(output), output, normal, *arguments)
        both = attention_backward.instance_attention_backward(*given, True, True)
        keys = attention_backward.instance_attention_backward(*given, True, False)
        values = attention_backward.instance_attention_backward(*given, False, True)
        assert len(both) == len(keys) + len(values)
        assert all(torch.equal(one, other) for one, other in zip([*keys, *values], both))


@case("a query that may attend to nothing")
def masked_query():
    arguments = draw(*FEW, dtype=torch.float64, projected=False)
    for table in arguments[3]:
        table[1, 1, 0] = -math.inf
    output = check(arguments)[0]  # as plain torch has it, the gradients too
    assert output[1, 1, 0].isnan().all() and output.isnan().sum() == output.shape[3]


@case("sums of queries and weight in memory")
def sums_apart():
    kept = configurations.backward
    configurations.backward = lambda shape, card: dataclasses.replace(
        kept(shape, card), sums_in_memory=True, single=False
    )
    try:
        check(draw(*FEW, dtype=torch.float64, projected=True))
        check(draw(*BLOCKS, dtype=torch.float32, projected=True))
    finally:
        configurations.backward = kept


@case("nan comes through")
def nan():
    arguments = draw(*FEW, dtype=torch.float64, projected=True)
    arguments[1][0][1, 2, 3, 4] = math.nan
    output, logsumexp, _ = attention_forward.instance_attention(*arguments)
    assert output[1].isnan().all() and logsumexp[1].isnan().all() and output[0].isfinite().all()


@case("sliced queries and strided tables")
def sliced():
    arguments = draw(*BLOCKS, dtype=torch.float64, projected=True)
    arguments[0] = arguments[0][:, :, 1:4]
    arguments[3] = [table[:, :, 1:4] for table in arguments[3]]
    arguments[4] = [table[:, :, 1:4].transpose(2, 3).contiguous().transpose(2, 3) for table in arguments[4]]
    check(arguments)


@case("no chosen query")
def nothing_chosen():
    arguments = draw(*FEW, dtype=torch.float32, projected=False)[:5]
    masses = attention_mass.attention_mass(*arguments, torch.zeros(2, 3, dtype=torch.bool), None, 1.0)
    assert all(not level.any() for level in masses)


@case("arguments that do not fit")
def misfits():
    arguments = draw(*FEW, dtype=torch.float32, projected=True)
    output, logsumexp, normal = attention_forward.instance_attention(*arguments)
    chosen = torch.ones(2, 3, dtype=torch.bool)
    wrong = [[one[..., 1:] for one in arguments[3]], [one.double() for one in arguments[3]], arguments[3][:1]]
    for table in wrong:
        with_wrong = [*arguments[:3], table, *arguments[4:]]
        for call in (
            lambda given=with_wrong: attention_forward.instance_attention(*given),
            lambda given=with_wrong: attention_mass.attention_mass(*given[:5], chosen, logsumexp, 1.0),
            lambda given=with_wrong: attention_backward.instance_attention_backward(
                output, output, normal, *given, True, True
            ),
        ):
            refuses(call, "arguments must fit")
    refuses(
        lambda: attention_backward.instance_attention_backward(output[:1], output, normal, *arguments, True, True),
        "grad must be",
    )
    refuses(lambda: attention_mass.attention_mass(*arguments[:5], chosen[:1], logsumexp, 1.0), "chosen must be")
    refuses(lambda: attention_mass.attention_mass(*arguments[:5], chosen, logsumexp[:1], 1.0), "logsumexp must be")


def refuses(call, message):
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no error that says {message!r}")


def selected():
    """Names of the cases of this run."""
    return [name for name in CASES if os.environ.get(LONG) or name not in LATER]


def main(out, names):
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # a cell nobody wrote cannot pass for a zero
    torch.set_num_threads(1)
    shuffle_programs()
    keep_bfloat16_as_gpus_do()
    small_blocks()
    found = {}
    for name in names:
        start = time.process_time()
        torch.manual_seed(0)
        try:
            CASES[name]()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        print(f"{name}: {'failed' if found[name] else 'ok'}, {time.process_time() - start:.1f} s", flush=True)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or selected())
