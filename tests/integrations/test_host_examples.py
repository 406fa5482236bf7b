"""Each example of a host runs on generated pictures, with few steps: bring_your_own.py by its command.

The others run in this process, which has imported the hosts already. Without detectron2 and mmdetection their examples
run on the stand-ins of detectron2_cases.py and mmdetection_cases.py.
"""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs an example as `python examples/<name>.py <pictures> <arguments>` does; returns what it printed."""

    def call(name, *arguments):
        path = EXAMPLES / f"{name}.py"
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [str(path), str(folder / "scenes"), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("method", ["icd", pytest.param("lgd", marks=pytest.mark.long)])
def test_bring_your_own(folder, method):
    """By its command; at most sixty lines of code."""
    path = EXAMPLES / "bring_your_own.py"
    command = [sys.executable, path, folder / "scenes", "4", method]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{method}_distill = " in done.stdout and "4 batches, 4 steps" in done.stdout
    assert sum(bool(line.strip()) for line in path.read_text().splitlines()) <= 60


def test_torchvision(folder, run):
    printed = run("host_torchvision", 2)
    assert "icd_distill = " in printed and "2 batches, 2 steps" in printed and (folder / "student.pth").exists()


@pytest.mark.parametrize(("name", "package"), [("host_lightning", "lightning"), ("host_transformers", "transformers")])
def test_the_example_trains_and_distils(run, name, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install .[hosts])")
    printed = run(name, 2)
    assert "icd_distill = " in printed and "2 batches, 2 steps" in printed


def test_ultralytics(run):
    pytest.importorskip("ultralytics", reason="ultralytics is not installed (pip install .[hosts])")
    printed = run("host_ultralytics", 1)
    assert "icd_distill = " in printed and "8 batches" in printed


@pytest.mark.parametrize(("name", "package"), [("detectron2", "detectron2"), ("mmdetection", "mmdet")])
@pytest.mark.parametrize("method", ["icd", "lgd"])
def test_hosts_that_cannot_be_installed_everywhere(run, name, package, method, request):
    if importlib.util.find_spec(package) is None:
        request.getfixturevalue(f"{name}_modules")
    printed = run(f"host_{name}", 2, method)
    assert f"{method}_distill" in printed and "2 batches, 2 steps" in printed
