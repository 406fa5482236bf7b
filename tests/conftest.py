"""Common to all tests: poisoned uninitialised memory, deterministic algorithms, a fixed number of threads."""

import os

import matplotlib
import pytest
import torch
from kernels import CAPABILITIES

from fastkd.ops._support import library

matplotlib.use("Agg")
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU is visible to torch")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (largest value for integers), so that unwritten cells are not mistaken for zeros."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def fixed_threads_and_seed():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)


def _use_capability(request, monkeypatch):
    monkeypatch.setenv("FASTKD_CPU_CAPABILITY", request.param)
    assert library.cpu_capability() == request.param
    return request.param


@pytest.fixture(params=[name for name in CAPABILITIES if name != "avx512_bf16"])
def capability(request, monkeypatch):
    """Each instruction set of this CPU except bf16 dot products, which most ops do not use."""
    return _use_capability(request, monkeypatch)


@pytest.fixture(params=CAPABILITIES)
def capability_with_bf16(request, monkeypatch):
    """Each instruction set of this CPU."""
    return _use_capability(request, monkeypatch)
