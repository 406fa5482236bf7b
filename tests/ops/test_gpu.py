"""Every op's GPU kernel against the reference, on a GPU: `make test-gpu`. The calls are those of the CPU tests.

Without a GPU only the harness is tested, on the CPU.
"""

import os
import random
import sys
import warnings

import pytest
import test_attention
import test_box_paint_conv3x3
import test_imitation_mask
import test_instance_norm_mse
import test_masked_mse
import test_norm_relu_box_pool
import test_pool_paint
import test_value_mimic
import torch
from kernels import channels_last, compile_and_export, contiguous, fuzz, leaves, results_and_gradients
from tolerance import assert_no_worse
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from fastkd import ops

DRAWS = {
    "instance_attention": test_attention.draw_any,
    "attention_mass": test_attention.draw_mass,
    "box_paint_conv3x3": test_box_paint_conv3x3.draw,
    "imitation_mask": test_imitation_mask.draw,
    "instance_norm_mse": test_instance_norm_mse.draw,
    "masked_mse": test_masked_mse.draw,
    "norm_relu_box_pool": test_norm_relu_box_pool.draw,
    "value_mimic": test_value_mimic.draw,
    **{op: test_pool_paint.draw(op) for op in test_pool_paint.OPS},
}
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
    """compute-sanitizer's initcheck sees no uninitialised read where the memory was poisoned."""
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
    fuzz(*pair(op), draw_on(op, "cuda"), count=CALLS)


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


@gpu
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projections_no_worse_than_plain(dtype, layout):
    """No op of fastkd.ops: ICD's projection of all levels, forward and backward, and the same bits twice."""
    import projection_triton_cases as cases

    from fastkd.ops import project_levels

    torch.manual_seed(3)
    for channels, outputs in ((256, 256), (40, 24)):
        drawn = cases.draw(2, channels, outputs, [(100, 168), (25, 42), (1, 1)], dtype=dtype, layout=layout)
        levels, weight, bias, grads = tree_map(lambda value: moved(value, "cuda"), drawn)
        assert project_levels.kernel_takes(levels)
        plain, exact = (cases.by_torch(levels, weight, bias, grads, kind) for kind in (dtype, torch.float64))
        found = []
        for _ in range(2):
            inputs = [value.detach().requires_grad_() for value in (*levels, weight, bias)]
            results = project_levels.project_levels(inputs[:-2], *inputs[-2:])
            gradients = torch.autograd.grad(results, inputs, grads)
            pyramids = (cases.shared.flat(results), cases.shared.flat(gradients[:-2]))
            found.append([*(one.detach() for one in pyramids), *gradients[-2:]])
        assert_no_worse(found[0], plain, exact)
        assert all(map(torch.equal, *found))


def test_every_op_is_drawn():
    assert {name for name in ops.__all__ if f"{name}_reference" in ops.__all__} == set(DRAWS)


@pytest.mark.parametrize("op", OPS)
def test_the_harness_on_the_cpu(op):
    fuzz(*pair(op), draw_on(op, "cpu"), count=3)
    drawn = DRAWS[op](random.Random(3))
    for value in tree_flatten(drawn)[0]:
        if isinstance(value, Tensor):
            there = moved(value, "cpu")
            assert torch.equal(there, value) and there.stride() == value.stride()
            assert there.requires_grad == value.requires_grad and (there is not value)
