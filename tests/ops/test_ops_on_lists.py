"""Ops on lists of boxes, attention without bias tables, and what importing the ops needs."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd import ops

ROOT = Path(__file__).resolve().parents[2]


def test_the_example(capsys):
    runpy.run_path(str(ROOT / "examples/ops_on_lists.py"))
    assert capsys.readouterr().out.startswith("loss ")


def test_the_example_shows_every_op():
    text = (ROOT / "examples/ops_on_lists.py").read_text()
    names = {name.removesuffix("_reference") for name in ops.__all__ if name.endswith("_reference")}
    assert all(f"ops.{name}(" in text for name in names), names


def test_cat_boxes():
    lists = [torch.rand(3, 4), torch.rand(0, 4), torch.rand(1, 4)]
    boxes, index = ops.cat_boxes(lists)
    assert torch.equal(boxes, torch.cat(lists)) and index.tolist() == [0, 0, 0, 2] and index.dtype == torch.int64
    assert [len(part) for part in ops.cat_boxes([torch.zeros(0, 4)])] == [0, 0]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "must be a list of"),
        (torch.rand(2, 4), "must be a list of"),
        ([torch.rand(2, 5)], r"boxes\[0\] must be \[K_b, 4\], got \[2, 5\]"),
        ([torch.rand(2, 4), torch.rand(1, 4).double()], r"boxes\[1\] must be torch.float32 on cpu as the first"),
    ],
)
def test_cat_boxes_refuses(boxes, message):
    with pytest.raises(ValueError, match=message):
        ops.cat_boxes(boxes)


@pytest.mark.parametrize("count", [3, 50])
def test_attention_without_bias_tables(count):
    """As torch's attention, gradients too."""
    sizes = [(5, 7), (2, 3)]
    queries = torch.randn(2, 2, count, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    levels = [torch.randn(2, 6, *size, dtype=torch.float64) for size in sizes]
    values = [torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
    cells = torch.cat([level.flatten(2) for level in levels], 2)
    keys = (weight @ cells).unflatten(1, (2, 4)).transpose(2, 3)
    value = torch.cat([one.flatten(2) for one in values], 2).unflatten(1, (2, 4)).transpose(2, 3)
    wanted = [queries, weight, *values]
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, value, scale=1.0)
    theirs = torch.autograd.grad(expected.square().sum(), wanted)
    for function in (ops.instance_attention, ops.instance_attention_reference):
        output, logsumexp = function(queries, levels, weight, None, None, values)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(logsumexp, (queries @ keys.transpose(2, 3)).logsumexp(3).detach())
        torch.testing.assert_close(torch.autograd.grad(output.square().sum(), wanted), theirs)


@pytest.mark.parametrize("count", [3, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_mass_without_bias_tables(count, temperature):
    """As the sum over rows of torch's softmax."""
    sizes = [(5, 7), (2, 3)]
    queries, weight = torch.randn(2, 2, count, 4, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    levels = [torch.randn(2, 6, *size, dtype=torch.float64) for size in sizes]
    chosen = torch.rand(2, count) < 0.6
    cells = torch.cat([level.flatten(2) for level in levels], 2)
    logits = queries @ (weight @ cells).unflatten(1, (2, 4))  # [B, G, N, S]
    expected = ((logits / temperature).softmax(3) * chosen[:, None, :, None]).sum(2).split([35, 6], 2)
    known = logits.logsumexp(3) if temperature == 1 else None
    for function in (ops.attention_mass, ops.attention_mass_reference):
        for logsumexp in (None, known):
            found = function(queries, levels, weight, None, None, chosen, logsumexp, temperature)
            assert [tuple(level.shape[2:]) for level in found] == sizes
            torch.testing.assert_close([level.flatten(2) for level in found], list(expected))


def test_ops_and_distillers_need_torch_and_numpy_alone():
    """Whatever else is installed cannot be imported; what torch itself asks for may be missing."""
    pytest.importorskip("torchvision", reason="nothing is installed that could be missed")
    code = """
import sys, importlib.metadata
needed = {"torch", "numpy", "fastkd", "sympy", "mpmath", "typing_extensions", "networkx", "jinja2", "markupsafe",
          "filelock", "fsspec", "triton", "torchgen", "functorch", "cuda", "nvidia", "tqdm"}  # what torch itself needs
blocked = set(importlib.metadata.packages_distributions()) - needed
assert {"torchvision", "pytest"} <= blocked
sys.modules.update({name: None for name in blocked if name not in sys.modules})
import fastkd.ops, fastkd.distillers
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
