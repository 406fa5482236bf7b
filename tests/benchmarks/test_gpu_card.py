"""Messages of `make test-gpu` and similar commands without a GPU, or without kernels for it."""

import shutil

import pytest
import torch

from benchmarks.gpu import card as gpu_card
from fastkd.ops._support import library


@pytest.fixture
def card(monkeypatch):
    """A GPU of 9.0, and kernels for it."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(library, "why_no_cuda", lambda: None)
    monkeypatch.setattr(library, "cuda_build", lambda: "sm_80 sm_90 compute_80")


def told(arguments, capsys):
    code = gpu_card.main(arguments)
    output = capsys.readouterr()
    assert bool(output.err) == bool(code) and bool(output.out) != bool(code)
    return code, (output.out + output.err).rstrip("\n")


def test_all_is_there(card, monkeypatch, capsys):
    assert told([], capsys) == (0, "a card")
    monkeypatch.setattr(shutil, "which", lambda name, path: f"/bin/{name}")
    assert told(["--sanitizer"], capsys) == (0, "/bin/compute-sanitizer")


def test_no_cuda(card, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    code, line = told([], capsys)
    assert code == 1 and "is built without CUDA; install" in line and "\n" not in line


@pytest.mark.parametrize("arguments", [[], ["--card"], ["--sanitizer"]])
def test_no_gpu(card, monkeypatch, capsys, arguments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, line = told(arguments, capsys)
    assert code == 1 and line.startswith("gpu: no GPU is visible to torch; run this on") and "\n" not in line


def test_no_kernels(card, monkeypatch, capsys):
    monkeypatch.setattr(library, "why_no_cuda", lambda: "not built; build it")
    assert told([], capsys) == (1, "gpu: not built; build it")
    assert told(["--card"], capsys) == (0, "a card")
    monkeypatch.setattr(library, "why_no_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert told([], capsys)[1].startswith("gpu: this GPU is sm_75, the kernels are built for sm_80 sm_90 compute_80;")


def test_no_sanitizer(card, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    code, line = told(["--sanitizer"], capsys)
    assert code == 1 and line.startswith("gpu: compute-sanitizer is not on PATH nor in CUDA_HOME; install")
