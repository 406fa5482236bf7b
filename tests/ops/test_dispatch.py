"""Dispatch of ops: the rule, use_backend, CUDA tensors, and warnings."""

import functools
import importlib.util
import io
import sys
import types
import warnings

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from fastkd import info, ops
from fastkd.ops._support import dispatch, library

OPS = sorted(name for name in ops.__all__ if f"{name}_reference" in ops.__all__)
CUDA_BUILD = torch.version.cuda is not None


def pyramids():
    return [[torch.randn(2, 3, 5, 4), torch.randn(2, 3, 2, 1)] for _ in range(2)]


@pytest.fixture
def fresh(monkeypatch):
    """Clear the caches of warnings and look-ups."""
    monkeypatch.setattr(dispatch, "_warn_once", functools.cache(dispatch._warn_once.__wrapped__))
    for name in ("why_no_cuda", "why_no_triton", "why_not_on_card"):
        monkeypatch.setattr(library, name, functools.cache(getattr(library, name).__wrapped__))


@pytest.fixture
def calls(monkeypatch):
    """The names of the implementations of instance_norm_mse that ran."""
    found, module = [], sys.modules["fastkd.ops.instance_norm_mse"]
    reference = module.instance_norm_mse_reference

    def recorded(*arguments):
        found.append("reference")
        return reference(*arguments)

    monkeypatch.setattr(module, "instance_norm_mse_reference", recorded)
    return found


def test_every_op_has_a_dispatch_of_its_name():
    for op in OPS:
        assert sys.modules[f"fastkd.ops.{op}"]._DISPATCH.op == op


def test_use_backend(calls):
    student, teacher = pyramids()
    ours = ops.instance_norm_mse(student, teacher)
    assert calls == []
    with ops.use_backend("reference"):
        plain = ops.instance_norm_mse(student, teacher)
        with ops.use_backend("compiled"):
            ops.instance_norm_mse(student, teacher)
        assert calls == ["reference"]
        ops.instance_norm_mse(student, teacher)
    ops.instance_norm_mse(student, teacher)
    assert calls == ["reference"] * 2
    torch.testing.assert_close(ours, plain)


def test_use_backend_ends_with_an_error_too():
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert dispatch._backend == "compiled"


def test_use_backend_refuses_other_names():
    with pytest.raises(ValueError, match=r"use_backend: name must .*, got 'cuda'; choose one"), ops.use_backend("cuda"):
        pass


def test_without_a_registered_op_the_reference_runs(monkeypatch):
    own = dispatch.Dispatch("instance_norm_mse")
    assert own.compiled(torch.zeros(1)) and not own.compiled(torch.zeros(1, device="meta"))
    own.registered = False
    assert not own.compiled(torch.zeros(1))


def graph_of(call, arguments):
    """Names of the fastkd ops in the graph that torch.compile makes of a call."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    compiled(*arguments)
    return compiled, lambda: [ops_in(graph) for graph in graphs]


def ops_in(graph):
    return [str(node.target) for node in graph.graph.nodes if "fastkd" in str(node.target)]


def test_torch_compile_follows_use_backend():
    compiled, graphs = graph_of(ops.instance_norm_mse, pyramids())
    with ops.use_backend("reference"):
        compiled(*pyramids())
        compiled(*pyramids())
    compiled(*pyramids())
    first, second = graphs()
    assert "instance_norm_mse" in first[0] and second == []


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_follows_use_backend(backend, strict):
    class Module(torch.nn.Module):
        def forward(self, student, teacher):
            return ops.instance_norm_mse(student, teacher)

    arguments = tuple(pyramids())
    with ops.use_backend(backend):
        exported = torch.export.export(Module(), arguments, strict=strict)
    assert len(ops_in(exported.graph_module)) == (backend == "compiled")
    torch.testing.assert_close(exported.module()(*arguments), ops.instance_norm_mse(*arguments))


# CUDA tensors, without a GPU: fake ones


def on_fake_gpu():
    with FakeTensorMode():
        return [[torch.empty(2, 3, 5, 4, device="cuda")] for _ in range(2)]


needs_cuda_build = pytest.mark.skipif(not CUDA_BUILD, reason="torch is built without CUDA")


@needs_cuda_build
def test_a_cuda_tensor_without_kernels_takes_the_reference_and_says_so_once(fresh, calls, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "BUILT_IN_CUDA", tmp_path / "_cuda.so")
    arguments = on_fake_gpu()
    with pytest.warns(UserWarning, match=r"^instance_norm_mse: a CUDA tensor takes the reference.*_cuda.so is not"):
        ops.instance_norm_mse(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.instance_norm_mse(*arguments)
    assert calls == ["reference"] * 2


@needs_cuda_build
def test_a_cuda_tensor_without_the_cpu_library_says_so_too(fresh, monkeypatch):
    """It defines the schemas: without it no op is registered on any device."""
    monkeypatch.setattr(library, "why_not_loaded", lambda: "fastkd/_cpu.so is not built; run `make build`")
    own = dispatch.Dispatch("instance_norm_mse")
    (level,), _ = on_fake_gpu()
    assert not own.registered and not own.compiled(torch.zeros(1))
    with pytest.warns(UserWarning, match=r"^instance_norm_mse: a CUDA tensor takes the ref.*_cpu.so is not built"):
        assert not own.compiled(level)


@needs_cuda_build
@pytest.mark.parametrize("traced", [False, True])
def test_a_cuda_tensor_takes_a_registered_kernel(fresh, calls, monkeypatch, traced):
    monkeypatch.setattr(library, "why_no_kernel", lambda op, device="cpu": None)
    call = ops.instance_norm_mse
    if traced:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss = call(*on_fake_gpu())
    assert calls == [] and loss.device.type == "cuda"


@needs_cuda_build
@pytest.mark.parametrize("capability", [(7, 0), (9, 0)])
def test_a_card_without_machine_code_takes_the_reference(fresh, calls, monkeypatch, capability):
    monkeypatch.setattr(library, "why_no_kernel", lambda op, device="cpu": None)
    monkeypatch.setattr(library, "cuda_build", lambda: "sm_80 sm_90 compute_80, ...")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    arguments = on_fake_gpu()
    if capability == (9, 0):
        ops.instance_norm_mse(*arguments)
    else:
        with pytest.warns(UserWarning, match=r"this GPU is sm_70, .* for sm_80 sm_90 compute_80; rebuild with"):
            ops.instance_norm_mse(*arguments)
    assert calls == ["reference"] * (capability != (9, 0))


@pytest.mark.parametrize(
    ("build", "capability", "runs"),
    [
        ("sm_80 sm_90", (8, 0), True),
        ("sm_80 sm_90", (8, 9), True),  # later card of the same major version
        ("sm_86 sm_90", (8, 0), False),  # earlier card
        ("sm_80 sm_90", (10, 0), False),  # another major version
        ("sm_80 compute_80", (12, 0), True),  # compiled by the driver
        ("sm_80 compute_90", (8, 0), True),
        ("sm_90 compute_90", (8, 0), False),
        ("sm_100 compute_100", (9, 0), False),
        ("sm_100", (10, 3), True),
    ],
)
def test_cards_a_build_runs_on(build, capability, runs):
    reason = library.why_unsupported(build, capability)
    assert (reason is None) == runs
    if not runs:
        assert f"this GPU is sm_{capability[0]}{capability[1]}, the kernels are built for {build}; rebuild" in reason


def test_reasons_for_no_gpu_kernels(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "_cuda.so"
    monkeypatch.setattr(library, "BUILT_IN_CUDA", broken)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "_cuda.so is not built; `FASTKD_CUDA=1 pip install .`" in library.why_no_cuda.__wrapped__()
    broken.write_text("not a library")
    assert "_cuda.so cannot be loaded (" in library.why_no_cuda.__wrapped__()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; install a CUDA build of torch" in library.why_no_cuda.__wrapped__()
    monkeypatch.setattr(library, "why_not_loaded", lambda: "no CPU library")
    assert library.why_no_cuda.__wrapped__() == "no CPU library"
    assert library.why_no_kernel("box_pool", "cuda") == "no CPU library"


def test_a_library_without_the_op_is_a_reason(monkeypatch):
    monkeypatch.setattr(library, "why_no_cuda", lambda: None)
    monkeypatch.setattr(library, "_has_cuda_kernel", lambda name: name.endswith("_backward"))
    assert library.why_no_kernel("box_pool", "cuda") == "no kernel of box_pool in this version"
    monkeypatch.setattr(library, "_has_cuda_kernel", lambda name: True)
    assert library.why_no_kernel("box_pool", "cuda") is None and library.has_kernel("box_pool", "cuda")
    assert library.why_no_kernel("no_such_op", "cuda") == "no kernel in this version"


def test_the_attention_ops_ask_triton(fresh, monkeypatch):
    module = types.ModuleType("fastkd.ops.triton")
    module.register = lambda: "triton is not installed"
    monkeypatch.setitem(sys.modules, "fastkd.ops.triton", module)
    monkeypatch.setattr(ops, "triton", module, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    for op in library.TRITON_OPS:
        assert library.why_no_kernel(op, "cuda") == "triton is not installed"


def test_info_names_what_every_op_runs(monkeypatch):
    reasons = {"box_pool": "it is not built", "attention_mass": None}
    monkeypatch.setattr(
        library, "why_no_kernel", lambda op, device="cpu": reasons.get(op) if device == "cuda" else None
    )
    found = info.collect()["ops"]
    assert set(found) == {*OPS, "focal_loss"}  # which has no kernel for GPUs
    assert found["box_pool"] == {"cpu": "compiled", "cuda": "plain torch: it is not built"}
    assert found["attention_mass"]["cuda"] == "compiled by Triton when first called"
    assert found["box_paint"]["cuda"] == "compiled"


def test_info_says_why_there_is_no_gpu(monkeypatch):
    """No driver, a driver that is too old: in torch's words."""

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert info.collect()["cuda"]["why_no_gpu"].endswith("is too old (found version 11040).")
    console = Console(record=True, width=200, file=io.StringIO())
    info.print_info(console)
    assert (
        "none usable; torch is built" in (text := console.export_text()) and "driver on your system is too old" in text
    )


def test_info_names_a_card_without_code_and_the_free_memory(monkeypatch):
    card = types.SimpleNamespace(name="an old card", major=7, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 * 2**30, 24 * 2**30))
    monkeypatch.setattr(library, "cuda_build", lambda: "sm_80 compute_80")
    found = info.collect()["cuda"]
    assert found["gpus"] == ["an old card, sm_70, 3 of 24 GiB free"] and found["why_no_gpu"] is None
    assert "this GPU is sm_70, the kernels are built for sm_80 compute_80" in found["unsupported"][0]


def test_info_says_what_triton_lacks(monkeypatch):
    monkeypatch.setattr(library, "why_no_kernel", lambda op, device="cpu": None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "Triton needs a C compiler" in info.collect()["ops"]["attention_mass"]["cuda"]
    monkeypatch.setenv("CC", "/usr/bin/cc")
    assert info.collect()["ops"]["attention_mass"]["cuda"] == "compiled by Triton when first called"


@pytest.mark.parametrize(
    ("raised", "expected", "said"),
    [
        (
            RuntimeError("Failed to find C compiler.\nSet CC"),
            RuntimeError,
            r"a_kernel: Triton cannot compile .*Failed to",
        ),
        (ValueError("PTXAS error: internal"), RuntimeError, r"ValueError: PTXAS error.*`fastkd info`.*use_backend"),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError, r"^CUDA out of memory\.$"),
    ],
)
def test_a_triton_kernel_that_cannot_run_is_one_clear_error(raised, expected, said):
    plan = pytest.importorskip("fastkd.ops.triton.plan", reason="Triton is not installed")

    class Kernel:
        fn = types.SimpleNamespace(__name__="a_kernel")

        def __getitem__(self, grid):
            def launch(**arguments):
                raise raised

            return launch

    with pytest.raises(expected, match=said):
        plan.run([plan.Launch(Kernel(), 1, {})], torch.device("cpu"))
    plan.run([plan.Launch(Kernel(), 0, {})], torch.device("cpu"))
