"""The Triton kernels of instance_attention and attention_mass against plain torch, under Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd.ops import triton as kernels

pytest.importorskip("triton", reason="Triton is not installed")

from attention_triton_cases import selected

TESTS = Path(__file__).resolve().parents[1]


def python(*arguments, **environment):
    environment |= {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The error of each case, or None."""
    out = tmp_path_factory.mktemp("triton") / "found.json"
    run = python("-W", "ignore", TESTS / "attention_triton_cases.py", out, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", selected())
def test_interpreted(found, case):
    assert found[case] is None, found[case]


REGISTERED = """
import sys, torch
from fastkd.ops import triton, instance_attention
early = [name for name in sys.modules if name.startswith("fastkd.ops.triton.")]  # torchvision imports triton
assert not early, early
assert triton.register() is None and triton.register() is None
for name in ("instance_attention", "instance_attention_backward", "attention_mass"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastkd::{name}", "CUDA"), name
"""


@pytest.mark.skipif(not hasattr(torch.ops.fastkd, "attention_mass"), reason="the CPU library brings the schemas")
def test_importing_fastkd_imports_no_triton_kernels_and_register_does():
    run = python("-c", REGISTERED)
    assert run.returncode == 0, run.stderr


def test_why_not_registered(monkeypatch):
    kernels.register.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernels.register() == "triton is not installed; `pip install triton` brings the attention kernels for CUDA"
    kernels.register.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "_OPS", ("no_such_op",))
    assert "which defines fastkd::no_such_op, is not loaded" in kernels.register()
    kernels.register.cache_clear()


def test_tables_in_cuda_graphs(monkeypatch):
    """A graph's table is kept for as long as the process lives; its copy to the GPU cannot be captured."""
    from fastkd.ops.triton import plan

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(plan, "_IN_GRAPHS", [])
    table = torch.zeros(1)
    for _ in range(2):
        plan._keep(table, torch.device("cuda"))
    assert len(plan._IN_GRAPHS) == 1 and plan._IN_GRAPHS[0] is table
    with pytest.raises(RuntimeError, match="cannot capture the first call of a shape; call it once before capturing"):
        plan._on_device(table, torch.device("cuda"))
