"""Every op's GPU kernel against the reference, on a GPU: `make test-gpu`. The calls are those of the CPU tests.

Without a GPU only the harness is tested, on the CPU.
"""

import os
import random
import sys
import warnings

import pytest
import torch
from cases import CASES
from kernels import compile_and_export, fuzz, leaves, results_and_gradients
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from fastkd import ops

DRAWS = {case.name: case.draw for case in CASES if case.name in ops.__all__}
OPS = sorted(DRAWS)
CALLS = int(os.environ.get("FASTKD_GPU_CALLS", "200"))  # of each op; under the sanitizers, which are slow, fewer

gpu = pytest.mark.gpu


def moved(value, device):
    """A tensor on another device with the same strides; what is no tensor stays."""
    if not isinstance(value, Tensor):
        return value
    flat = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device, copy=True)
    there = flat.as_strided(value.shape, value.stride(), value.storage_offset())
    return there.requires_grad_(value.requires_grad)


def draw_on(op, device):
    return lambda choose: tree_map(lambda value: moved(value, device), DRAWS[op](choose))


def pair(op):
    return getattr(ops, op), getattr(ops, f"{op}_reference")


def arguments_on(op, device, seed=3):
    torch.manual_seed(seed)
    return draw_on(op, device)(random.Random(seed))


@pytest.fixture(autouse=True)
def poisoned_memory(poisoned_memory):
    """No poisoning: it would hide uninitialised reads from compute-sanitizer's initcheck."""
    if os.environ.get("FASTKD_POISON") == "0":
        torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.fixture
def on_gpu():
    """Only kernels: an op that takes the reference warns, and fails."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*a CUDA tensor takes the reference.*")
        yield


@gpu
@pytest.mark.parametrize("op", OPS)
def test_has_a_kernel(op):
    assert sys.modules[f"fastkd.ops.{op}"]._DISPATCH.compiled(torch.zeros(1, device="cuda"))


@gpu
@pytest.mark.parametrize("op", OPS)
def test_no_worse_than_plain(on_gpu, op):
    fuzz(*pair(op), draw_on(op, "cuda"), count=CALLS, seed=0)


@gpu
@pytest.mark.parametrize("op", OPS)
def test_waits_for_nothing(on_gpu, op):
    arguments = arguments_on(op, "cuda")
    results_and_gradients(pair(op)[0], arguments)  # what is compiled or loaded when first called is
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [value for value in tree_flatten(pair(op)[0](*arguments))[0] if value.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.ones_like(value) for value in results])
    finally:
        torch.cuda.set_sync_debug_mode(before)


def everything(op, arguments):
    """Results and gradients of a call, all on the device; nothing that a CUDA graph cannot capture."""
    results = [value for value in tree_flatten(pair(op)[0](*arguments))[0] if isinstance(value, Tensor)]
    roots, wanted = [value for value in results if value.requires_grad], leaves(arguments)
    gradients = []
    if roots and wanted:
        gradients = torch.autograd.grad(roots, wanted, [torch.ones_like(root) for root in roots], allow_unused=True)
    return [value.detach() for value in [*results, *gradients] if value is not None]


@gpu
@pytest.mark.parametrize("op", OPS)
def test_a_cuda_graph_captures_it(on_gpu, op):
    arguments = arguments_on(op, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled, loaded or copied when first called is
        expected = [everything(op, arguments) for _ in range(3)][-1]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(op, arguments)
    for value in captured:
        value.zero_()
    graph.replay()
    assert len(captured) == len(expected) and all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("op", OPS)
def test_what_a_graph_would_capture(op):
    """On the CPU: the harness finds results, and gradients where something wants one."""
    arguments = arguments_on(op, "cpu")
    results, gradients = results_and_gradients(pair(op)[0], arguments)
    assert len(everything(op, arguments)) >= len(results) + bool(gradients and results[0].is_floating_point())


@gpu
@pytest.mark.parametrize("op", OPS)
def test_same_bits_when_repeated(on_gpu, op):
    arguments = arguments_on(op, "cuda")
    first, second = (results_and_gradients(pair(op)[0], arguments) for _ in range(2))
    for ours, theirs in zip(first, second):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs))


@gpu
@pytest.mark.parametrize("op", OPS)
def test_compile_and_export(on_gpu, op):
    compile_and_export(pair(op)[0], arguments_on(op, "cuda"))


def test_every_op_is_drawn():
    """Except focal_loss, which has no GPU kernel."""
    assert {name for name in ops.__all__ if f"{name}_reference" in ops.__all__} == set(DRAWS)


@pytest.mark.parametrize("op", OPS)
def test_the_harness_on_the_cpu(op):
    fuzz(*pair(op), draw_on(op, "cpu"), count=3, seed=0)
    drawn = DRAWS[op](random.Random(3))
    for value in tree_flatten(drawn)[0]:
        if isinstance(value, Tensor):
            there = moved(value, "cpu")
            assert torch.equal(there, value) and there.stride() == value.stride()
            assert there.requires_grad == value.requires_grad and (there is not value)
