"""packaging/hf-kernels: the tree loads as Hugging Face's `kernels` loads it, and computes as fastkd.ops."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd import ops

ROOT = Path(ops.__file__).resolve().parents[2]
SCRIPT = ROOT / "packaging/hf-kernels/layout.py"
# As kernels/importer.py: the module's name is the id of the variant, not that of the package.
LOAD = """
def load(variant):
    import importlib.util, json, sys
    identity = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(identity, variant / "__init__.py")
    module = sys.modules[identity] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
exec(LOAD)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "kernel"
    subprocess.run([sys.executable, str(SCRIPT), str(out)], check=True)
    return out


@pytest.fixture(scope="module")
def kernel(tree):
    return load(tree / "build/torch-cpu")  # noqa: F821


def arguments(count=5, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = [(4, 6), (2, 3)]
    queries = torch.randn(2, 2, count, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(16, 12, dtype=dtype, requires_grad=True)
    levels, values = ([torch.randn(2, c, *size, dtype=dtype) for size in sizes] for c in (12, 16))
    return queries, levels, weight, None, None, values


def test_the_tree_is_complete_and_imports_no_fastkd(tree):
    assert {path.name for path in tree.iterdir()} == {
        "build.toml",
        "README.md",
        "LICENSE",
        "tests",
        "torch-ext",
        "build",
    }
    for variant in (tree / "torch-ext/fastkd", tree / "build/torch-cuda", tree / "build/torch-cpu"):
        texts = [path.read_text() for path in variant.rglob("*.py")]
        assert len(texts) == 17
        assert not any(
            re.search(r"(?m)^\s*(from|import) fastkd|torch\.ops\.fastkd|[\"']fastkd::", text) for text in texts
        )
    metadata = [json.loads(path.read_text()) for path in sorted(tree.glob("build/*/metadata.json"))]
    assert [one["backend"]["type"] for one in metadata] == ["cpu", "cuda"] and metadata[0]["id"] != metadata[1]["id"]


def test_a_folder_with_files_is_refused(tree):
    done = subprocess.run([sys.executable, str(SCRIPT), str(tree)], capture_output=True, text=True)
    assert done.returncode == 2 and "must be empty; remove it or name another folder" in done.stderr


def test_it_computes_as_fastkd(kernel):
    call, chosen = arguments(), torch.rand(2, 5) < 0.5
    found, expected = kernel.instance_attention(*call), ops.instance_attention_reference(*call)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    gradients = [torch.autograd.grad(output.sum(), (call[0], call[2])) for output, _ in (found, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    mass = kernel.attention_mass(*call[:5], chosen, found[1])
    other = ops.attention_mass_reference(*call[:5], chosen, expected[1])
    assert all(torch.equal(one, two) for one, two in zip(mass, other, strict=True))
    with pytest.raises(ValueError, match="instance_attention: key_weight must be"):
        kernel.instance_attention(call[0], call[1], call[2][:4], *call[3:])


def test_the_schemas_are_those_of_the_cpu_library(kernel):
    namespace = sys.modules[f"{kernel.__name__}.ops._support.dispatch"].SCHEMAS
    for schema in namespace:
        name = schema.partition("(")[0]
        assert str(getattr(torch.ops.fastkd, name).default._schema) == f"fastkd::{schema}"


INTERPRETED = """
import sys, pathlib, torch
variant = pathlib.Path(sys.argv[1])
module = load(variant)
assert "fastkd" not in sys.modules
name = module.__name__
register = __import__(name + ".ops.triton", fromlist=["register"]).register
assert register() is None, register()
forward = sys.modules[name + ".ops.triton.attention_forward"].instance_attention
mass = sys.modules[name + ".ops.triton.attention_mass"].attention_mass
prepared = sys.modules[name + ".ops.instance_attention"].kernel_arguments
tables = sys.modules[name + ".ops.instance_attention"].bias_tables
torch.manual_seed(0)
sizes = [(4, 6), (2, 3)]
queries, weight = torch.randn(1, 2, 5, 8), torch.randn(16, 12)
levels, values = ([torch.randn(1, c, *size) for size in sizes] for c in (12, 16))
call = (queries, levels, weight, *tables(queries, levels, None, None))
output, logsumexp, _ = forward(*prepared(*call), values)
chosen = torch.ones(1, 5, dtype=torch.bool)
expected = module.instance_attention_reference(*call, values)
torch.testing.assert_close(output, expected[0], rtol=1e-4, atol=1e-4)
torch.testing.assert_close(logsumexp, expected[1], rtol=1e-4, atol=1e-4)
masses = mass(*prepared(*call), chosen, logsumexp, 1.0)
torch.testing.assert_close(masses, module.attention_mass_reference(*call, chosen), rtol=1e-4, atol=1e-4)
"""


def test_its_triton_kernels_run_in_the_interpreter(tree, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = [sys.executable, "-c", LOAD + INTERPRETED, str(tree / "build/torch-cuda")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tree)
    assert done.returncode == 0, done.stderr


BY_KERNELS = """
import pathlib, sys, torch
from kernels import _rust, get_local_kernel
tree = pathlib.Path(sys.argv[1])
assert len(_rust.Build.open(tree).general.backends) == 2
module = get_local_kernel(tree, backend="cpu")
torch.manual_seed(0)
queries, weight = torch.randn(1, 2, 5, 8), torch.randn(16, 12)
levels, values = ([torch.randn(1, c, 4, 6)] for c in (12, 16))
call = (queries, levels, weight, None, None, values)
assert torch.equal(module.instance_attention(*call)[0], module.instance_attention_reference(*call)[0])
"""


def test_kernels_loads_it(tree):
    """Hugging Face's package itself, where it is installed: its check of build.toml and its loader."""
    if not list(importlib.metadata.Distribution.discover(name="kernels")):  # tests/kernels.py has the same name
        pytest.skip("kernels is not installed")
    done = subprocess.run([sys.executable, "-c", BY_KERNELS, str(tree)], capture_output=True, text=True, cwd=tree)
    assert done.returncode == 0, done.stderr
