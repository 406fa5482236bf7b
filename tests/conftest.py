"""Common to all tests: --long, fresh random cases, poisoned memory, deterministic algorithms, fixed threads."""

import os
import random

import draws
import matplotlib
import pytest
import torch
from kernels import CAPABILITIES

from fastkd import progress
from fastkd.ops._support import library

matplotlib.use("Agg")
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
SLOW = {
    "test_attention_triton.py",
    "test_compiled.py",
    "test_distributed.py",
    "test_four_processes.py",
    "test_elastic.py",
}


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests marked long too, and many random cases in each")


def pytest_configure(config):
    """In the environment, which the workers of pytest-xdist inherit."""
    os.environ.setdefault("FASTKD_TEST_SEED", str(random.SystemRandom().randrange(10**6)))
    if config.getoption("long"):
        os.environ[draws.LONG] = "1"


def pytest_report_header():
    return f"FASTKD_TEST_SEED={draws.seed()} draws the same random cases again"


@pytest.hookimpl(trylast=True)  # of what -k and -m have chosen
def pytest_collection_modifyitems(config, items):
    """Leaves out what only --long runs, and puts those first that take long, so that no worker ends with one."""
    if not config.getoption("long"):
        out = {item for item in items if item.get_closest_marker("long")}
        out |= draws.left_out([item for item in items if item.get_closest_marker("sampled") and item not in out])
        config.hook.pytest_deselected(items=list(out))
        items[:] = [item for item in items if item not in out]
    items.sort(key=lambda item: item.path.name not in SLOW)


def pytest_make_parametrize_id(val):
    """Short containers as they are written, and a dict of tensors by its keys: pytest would number them."""
    if isinstance(val, (dict, list, tuple)):
        text = str(val)
        if len(text) <= 60 and "<" not in text and "tensor(" not in text:
            return text
        return ", ".join(map(str, val)) if isinstance(val, dict) else None
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("random cases", f"FASTKD_TEST_SEED={draws.seed()}"))
    return report


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


class Display:
    """Stands for a terminal's display and remembers what was shown: {work: (unit, total, finished units)}."""

    def __init__(self):
        self.shown = {}

    def add_task(self, what, total, unit):
        self.shown[what] = (unit, total, 0)
        return what

    def update(self, what, completed, total=None):
        unit, known, _ = self.shown[what]
        self.shown[what] = (unit, known if total is None else total, completed)

    def remove_task(self, what):
        pass


@pytest.fixture
def shown(monkeypatch):
    """Records the progress that would be shown on a terminal: {work: (unit, total, finished units)}."""
    display = Display()
    monkeypatch.setattr(progress, "_begin", lambda console: display)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    return display.shown
