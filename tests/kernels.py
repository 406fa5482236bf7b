"""Shared by the tests of compiled ops: layouts, capabilities, comparison with the reference, fuzzing.

An op is called as op(*arguments); arguments are tensors, numbers, None and (nested) lists and tuples of them.
"""

import math
import random

import torch
from draws import draws
from draws import seed as seed_of_the_run
from tolerance import assert_no_worse, largest
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastkd.ops._support import library

CAPABILITIES = ["generic", "avx2", "avx512", "avx512_bf16"]
CAPABILITIES = CAPABILITIES[: CAPABILITIES.index(library.cpu_capability() or "generic") + 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def contiguous(level):
    return level


def channels_last(level):
    return level.contiguous(memory_format=torch.channels_last)


def strided(level):
    return level.repeat_interleave(2, -1)[..., ::2]


def transposed(level):
    return level.transpose(-1, -2).contiguous().transpose(-1, -2)


def expanded(level):
    """The first image for all images, with stride 0."""
    return level[:1].expand(level.shape)


LAYOUTS = [contiguous, channels_last, strided, transposed]


def is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def double(arguments):
    """The same values as float64 leaves; requires_grad is kept."""
    return tree_map(lambda v: v.detach().double().requires_grad_(v.requires_grad) if is_float(v) else v, arguments)


def convert(arguments, dtype):
    """Floating-point tensors rounded to a dtype, as leaves; requires_grad is kept."""
    return tree_map(lambda v: v.detach().to(dtype).requires_grad_(v.requires_grad) if is_float(v) else v, arguments)


def leaves(arguments) -> list[Tensor]:
    """The tensors that require a gradient, in order."""
    return [value for value in tree_flatten(arguments)[0] if is_float(value) and value.requires_grad]


def results_and_gradients(op, arguments, seed=0):
    """Floating-point and other results of a call, and all gradients.

    The cotangents are drawn from the seed, with values that every dtype holds exactly.
    """
    results = [value for value in tree_flatten(op(*arguments))[0] if isinstance(value, Tensor)]
    generator = torch.Generator().manual_seed(seed)
    roots, cotangents = [], []
    for value in results:
        cotangent = torch.randint(-8, 9, value.shape, generator=generator) / 8
        if value.requires_grad:
            roots.append(value)
            cotangents.append(cotangent.to(value))
    wanted = leaves(arguments)
    gradients = torch.autograd.grad(roots, wanted, cotangents, allow_unused=True) if roots and wanted else []
    gradients = [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(wanted, gradients)]
    return [value.detach() for value in results], gradients


def check(op, reference, arguments, seed=0):
    """Asserts that results and gradients are no worse than plain torch's (the tolerance rule), others equal."""
    actual, plain = (results_and_gradients(one, arguments, seed) for one in (op, reference))
    exact = results_and_gradients(reference, double(arguments), seed)
    for ours, theirs, truth in zip(actual, plain, exact):
        assert len(ours) == len(theirs) == len(truth)
        for one, other, third in zip(ours, theirs, truth):
            if other.is_floating_point():
                assert_no_worse(one, other, third)
            else:
                assert torch.equal(one, other)


def close_to_float64(op, reference, arguments, rtol=1e-10, seed=0):
    """Asserts that the op on float64 gives the reference's float64 results and gradients."""
    arguments = double(arguments)
    for ours, theirs in zip(*(results_and_gradients(one, arguments, seed) for one in (op, reference))):
        for one, other in zip(ours, theirs):
            atol = rtol * max(largest(other.double()), 1e-30) if other.is_floating_point() else 0
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def same_bits(op, arguments, threads=(1, 2, 3)):
    """Asserts that results and gradients are the same bits when a call is repeated with each number of threads."""
    for count in threads:
        torch.set_num_threads(count)
        first, second = (results_and_gradients(op, arguments) for _ in range(2))
        for ours, theirs in zip(first, second):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs))


def opcheck(op, arguments):
    """torch.library.opcheck of a raw op, all four tests."""
    torch.library.opcheck(op, arguments)


def compile_and_export(op, arguments):
    """Asserts that op is one graph for torch.compile and torch.export, with the same results and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected, actual = results_and_gradients(op, arguments), results_and_gradients(compiled, arguments)
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs, equal_nan=True)

    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return op(*arguments)

    frozen = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, arguments)
    exported = torch.export.export(Module(), tuple(frozen)).module()(*frozen)
    flat = [value for value in tree_flatten(exported)[0] if isinstance(value, Tensor)]
    torch.testing.assert_close(flat, expected[0], equal_nan=True)


FEW = 16  # elements of a tensor that `fuzz` measures apart
EPS = torch.finfo(torch.float32).eps


def random_calls(count, draw, seed):
    """Yields (name, random.Random, arguments) of `count` calls; torch's global seed is set for each."""
    choose = random.Random(seed)
    for index in range(count):
        torch.manual_seed(seed * 1_000_003 + index)
        yield f"call {index} of FASTKD_TEST_SEED={seed}", choose, draw(choose)


def fuzz(op, reference, draw, count=None, seed=None):
    """Asserts the tolerance rule over many random calls.

    Errors are measured against float64 and relative to the largest value of a tensor; the largest over all calls of
    one dtype must be at most twice plain torch's, plus one ulp, plus 16 ulps of float32 at most: the calls are small
    and the largest errors of two algorithms over some hundred of them differ by luck. Tensors of few elements, all of
    which may cancel to almost nothing, are measured apart, relative to the largest of all gradients (or results) of
    the call.

    Args:
        draw: random.Random -> arguments; draws shapes, dtypes, layouts and values (torch's global seed is set).
        count: of calls; None: 1000 or a fifth (draws.py).
        seed: of the calls; None: of this run.
    """
    count, seed = draws(1000) if count is None else count, seed_of_the_run() if seed is None else seed
    worst = {}
    for index, (call, _, arguments) in enumerate(random_calls(count, draw, seed)):
        exact = results_and_gradients(reference, double(arguments), index)
        for who, one in (("ours", op), ("plain", reference)):
            found = results_and_gradients(one, arguments, index)
            for kind, mine, truth in zip(("result", "gradient"), found, exact):
                for place, (value, true) in enumerate(zip(mine, truth)):
                    assert value.shape == true.shape, f"{call}: {kind} {place} has the shape {value.shape}"
                    if not true.is_floating_point():
                        assert who == "plain" or torch.equal(value, true), f"{call}: {kind} {place}"
                        continue
                    assert value.isfinite().all() or not true.isfinite().all(), f"{call}: {kind} {place}"
                    few = value.numel() < FEW
                    scale = max(map(largest, truth)) if few else largest(true)
                    error = largest(value.double() - true) / scale if scale else largest(value.double())
                    record = worst.setdefault((kind, value.dtype, few), {"ours": (0.0, ""), "plain": (0.0, "")})
                    record[who] = max(record[who], (error, call))
    for (kind, dtype, _), record in worst.items():
        ulp = torch.finfo(dtype).eps
        allowed = 2 * record["plain"][0] + ulp + 16 * min(ulp, EPS)
        assert record["ours"][0] <= allowed, f"{kind} {dtype}: {record}, allowed {allowed:.3e}"


def _corrupt(value, choose):
    """A replacement for an argument."""
    if isinstance(value, Tensor):
        changes = [
            lambda: value.detach().to(choose.choice([torch.int32, torch.float64, torch.bool, torch.complex64])),
            lambda: value.detach().to(choose.choice([torch.float16, torch.bfloat16, torch.float8_e5m2])),
            lambda: value.detach()[..., :0],
            lambda: value.detach()[:0],
            lambda: value.detach()[..., 1:],
            lambda: value.detach().unsqueeze(choose.randint(0, value.dim())),
            lambda: value.detach().flatten(),
            lambda: value.detach().to("meta"),
            lambda: value.detach().transpose(0, -1),
            lambda: torch.cat([value.detach(), value.detach()]),
            lambda: torch.full_like(value.detach(), choose.choice([0, 1])),
            lambda: value.detach().to_sparse() if value.dim() else value.detach(),
        ]
        if value.is_floating_point():
            extremes = [math.nan, math.inf, -math.inf, 1e30, -1e30, -1.0]
            changes.append(lambda: torch.full_like(value.detach().double(), choose.choice(extremes)).to(value.dtype))
        elif value.dtype == torch.int64:
            extremes = [-1, 2**31, 2**62, -(2**63), 10]
            changes += [lambda: torch.full_like(value, choose.choice(extremes))] * 4
        return choose.choice(changes)()
    if isinstance(value, (list, tuple)):
        return choose.choice([[], list(value)[1:], list(value) * 2, tuple(value), None, 3, [None] * len(value)])
    return choose.choice([-1, 0, 1, 3, 2**20, 2**40, -(2**63), 1.5, math.nan, math.inf, None, "x", (), [1, 2]])


def corrupted(arguments, choose):
    """The arguments with one value, at any depth, replaced."""
    arguments = list(arguments)
    place = choose.randrange(len(arguments))
    value = arguments[place]
    if isinstance(value, (list, tuple)) and value and choose.random() < 0.7:
        arguments[place] = corrupted(value, choose)
    else:
        arguments[place] = _corrupt(value, choose)
    return arguments


def fuzz_hostile(name, op, draw):
    """Asserts that corrupted calls give a result or a ValueError or TypeError that begins with the op's name.

    Args:
        name: of the op, as its messages begin.
        draw: random.Random -> valid arguments.
    Returns: share of refused calls.
    """
    count, refused = draws(1000), 0
    for call, choose, arguments in random_calls(count, draw, seed_of_the_run()):
        try:
            op(*corrupted(arguments, choose))
        except (ValueError, TypeError) as error:
            refused += 1
            assert str(error).startswith(f"{name}: ") and "; " in str(error), f"{call}: {error}"
        except RuntimeError as error:  # valid arguments that need too much memory
            reasons = ("allocate", "overflow", "new_empty")  # the last: torch 2.10 and 2.11 drop the allocator's words
            assert any(reason in str(error) for reason in reasons), f"{call}: {error}"
    return refused / count


def fuzz_raw(op, draw):
    """Corrupted calls of a raw op (no Python checks before it) give a result or an exception, not a crash.

    Returns: share of refused calls.
    """
    count, refused = draws(300), 0
    for _, choose, arguments in random_calls(count, draw, seed_of_the_run()):
        flat, spec = tree_flatten(corrupted(arguments, choose))
        try:
            op(*tree_unflatten(flat, spec))
        except Exception:
            refused += 1
    return refused / count
