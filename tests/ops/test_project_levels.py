"""project_levels, ICD's projection of all levels in one kernel: by Triton's interpreter, as an op, in the decoder."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from kernels import channels_last, contiguous
from tolerance import assert_no_worse

from fastkd.distillers import decoder as icd_decoder
from fastkd.ops import project_levels as module

pytest.importorskip("triton", reason="Triton is not installed")

from projection_triton_cases import BLOCKS, CASES, FEW, by_torch, draw
from projection_triton_cases import shared as triton_cases

TESTS = Path(__file__).resolve().parents[1]
OP = torch.ops.fastkd.project_levels


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What went wrong in each case, None where nothing did."""
    out = tmp_path_factory.mktemp("triton") / "found.json"
    paths = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", TESTS / "projection_triton_cases.py", out]
    run = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_interpreted(found, case):
    assert found[case] is None, found[case]


def as_leaves(levels, weight, bias, wanted):
    tensors = [level.detach().requires_grad_(wanted[0]) for level in levels]
    return tensors, weight.detach().requires_grad_(wanted[1]), bias.detach().requires_grad_(wanted[2])


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, False, False)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_opcheck(layout, wanted):
    torch.manual_seed(0)
    levels, weight, bias, _ = draw(*FEW, layout=layout)
    torch.library.opcheck(OP, as_leaves(levels, weight, bias, wanted))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_on_a_cpu(layout):
    """The op without the kernel, for opcheck and tracing."""
    torch.manual_seed(0)
    *inputs, grads = draw(*BLOCKS, layout=layout)
    levels, weight, bias = as_leaves(*inputs, (True, True, True))
    results = module.project_levels(levels, weight, bias)
    gradients = torch.autograd.grad(results, [*levels, weight, bias], grads)
    ours = [triton_cases.flat(results), triton_cases.flat(gradients[: len(levels)]), *gradients[-2:]]
    assert_no_worse(ours, by_torch(*inputs, grads, torch.bfloat16), by_torch(*inputs, grads, torch.float64))
    with pytest.raises(RuntimeError, match="project_levels: double backward is not available"):
        results = module.project_levels(levels, weight, bias)
        (first,) = torch.autograd.grad(results, [weight], [one.requires_grad_() for one in grads], create_graph=True)
        torch.autograd.grad(first.sum(), [weight])


@pytest.mark.parametrize("half", [True, False])
def test_the_decoder_takes_the_kernel_for_half_types_on_a_gpu(monkeypatch, half):
    torch.manual_seed(0)
    levels, weight, _, grads = draw(*FEW)
    linear = torch.nn.Linear(*reversed(weight.shape))
    asked, taken = [], []
    monkeypatch.setattr(icd_decoder, "kernel_takes", lambda levels: asked.append(levels[0].dtype) or half)
    kernel = icd_decoder.project_by_kernel
    monkeypatch.setattr(icd_decoder, "project_by_kernel", lambda *inputs: taken.append(inputs) or kernel(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        results = icd_decoder.project_levels(linear, levels, train_bias=False)
    assert asked == [torch.bfloat16] and len(taken) == half
    expected = module.project_levels_reference([level.float() for level in levels], linear.weight, linear.bias)
    torch.testing.assert_close(results, expected, rtol=0.02, atol=0.02, check_dtype=False)
    assert torch.autograd.grad(results, [linear.weight, linear.bias], grads, allow_unused=True)[1] is None


def test_which_levels_the_kernel_takes(monkeypatch):
    monkeypatch.setattr(module._DISPATCH, "compiled", lambda level: True)
    level = types.SimpleNamespace()
    for level.dtype, device, wanted in (
        (torch.bfloat16, "cuda", True),
        (torch.float16, "cuda", True),
        (torch.float32, "cuda", False),
        (torch.bfloat16, "cpu", False),
    ):
        level.device = torch.device(device)
        assert module.kernel_takes([level]) is wanted
