"""Tests of all ops: random and corrupted calls, tracing, threads, double backward, and missing kernels."""

import pkgutil

import pytest
import torch
from cases import CASES, Case
from kernels import (
    DTYPES,
    compile_and_export,
    convert,
    fuzz,
    fuzz_hostile,
    fuzz_raw,
    leaves,
    opcheck,
    results_and_gradients,
    same_bits,
)
from torch.utils._pytree import tree_flatten

from fastkd import ops

every_op = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
fuzzed = [case for case in CASES if case.name != "imitation_mask"]  # there, with every instruction set
differentiable = [case for case in CASES if case.twice is not None]
ordered = [case for case in CASES if case.ordered is not None]


def equal(one, other) -> bool:
    """Whether results and gradients of two calls are the same bits."""
    return all(torch.equal(a, b) for ours, theirs in zip(one, other) for a, b in zip(ours, theirs, strict=True))


def test_the_table_has_every_op():
    modules = {module.name for module in pkgutil.iter_modules(ops.__path__) if not module.ispkg}
    assert {case.name for case in CASES} == modules


@pytest.mark.parametrize("case", fuzzed, ids=[case.name for case in fuzzed])
def test_fuzz(case: Case):
    fuzz(case.op, case.reference, case.draw)


@every_op
@pytest.mark.filterwarnings("ignore:Casting complex values")  # of embeddings made complex, in autograd
def test_corrupted_calls_are_refused(case: Case):
    assert fuzz_hostile(case.name, case.op, case.hostile or case.draw) > case.refused


@every_op
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_corrupted_calls_of_the_raw_ops(case: Case):
    for raw, draw, refused in case.raw:
        assert fuzz_raw(raw, draw) > refused


@every_op
def test_opcheck(case: Case):
    for op, arguments in case.opchecks():
        opcheck(op, tuple(arguments))


@every_op
def test_compile_and_export(case: Case):
    for arguments in case.traced() if case.traced else [case.call()]:
        arguments = list(arguments)
        split = len(arguments) - case.constants
        traced, constants = arguments[:split], arguments[split:]
        compile_and_export(lambda *tensors, constants=constants: case.op(*tensors, *constants), traced)


@pytest.mark.sampled
@every_op
def test_same_bits_with_any_number_of_threads(capability, case: Case):
    for arguments in case.parallel():
        same_bits(case.op, arguments)
        results = []
        for threads in case.across:
            torch.set_num_threads(threads)
            results.append(results_and_gradients(case.op, arguments))
        assert all(equal(one, results[0]) for one in results[1:])


@pytest.mark.parametrize("case", differentiable, ids=[case.name for case in differentiable])
def test_double_backward_is_a_clear_error(case: Case):
    arguments = case.call()
    results = [value for value in tree_flatten(case.op(*arguments))[0] if value.requires_grad]
    loss = sum(value.square().sum() for value in results)
    (gradient,) = torch.autograd.grad(loss, leaves(arguments)[case.twice], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{case.name}: double backward .*ops.{case.name}_reference"):
        gradient.sum().backward()


@pytest.mark.parametrize("case", ordered, ids=[case.name for case in ordered])
def test_gradients_have_the_memory_order_of_their_levels(case: Case):
    gradients = results_and_gradients(case.op, case.ordered())[1]
    assert len(gradients) >= 2
    for gradient in gradients:
        assert gradient.is_contiguous(memory_format=torch.channels_last) and not gradient.is_contiguous()


@every_op
def test_without_the_library_the_reference_runs(case: Case, monkeypatch):
    arguments = case.call()
    monkeypatch.setattr(case.module._DISPATCH, "registered", False)
    found, expected = (results_and_gradients(op, arguments) for op in (case.op, case.reference))
    assert found[0] and equal(found, expected)


@pytest.mark.sampled
@every_op
@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_result(case: Case, backend, low):
    """The rule in the docstring of fastkd.ops; gradients are computed after the region of autocast, as in training."""

    def under_autocast(*arguments):
        with torch.autocast("cpu", low):
            return case.op(*arguments)

    for dtype in DTYPES:
        arguments = convert(case.call(), dtype)
        with ops.use_backend(backend):
            found, plain = (results_and_gradients(op, arguments) for op in (under_autocast, case.op))
        if case.name == "box_paint_conv3x3":
            assert all(result.dtype == low for result in found[0])
            continue  # its values: test_box_paint_conv3x3.py
        assert [one.dtype for one in found[0]] == [one.dtype for one in plain[0]] and equal(found, plain)
