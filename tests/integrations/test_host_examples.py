"""Each example of a host runs by its command, on generated pictures, with few steps.

Without detectron2 and mmdetection their examples run on the stand-ins of detectron2_cases.py and mmdetection_cases.py.
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


def run(name, folder, *arguments):
    environment = {**os.environ, "YOLO_CONFIG_DIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, EXAMPLES / f"{name}.py", folder / "scenes", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("method", ["icd", pytest.param("lgd", marks=pytest.mark.long)])
def test_bring_your_own(folder, method):
    printed = run("bring_your_own", folder, 4, method)
    assert f"{method}_distill = " in printed and "4 batches, 4 steps" in printed


def test_torchvision(folder):
    printed = run("host_torchvision", folder, 2)
    assert "icd_distill = " in printed and "2 batches, 2 steps" in printed and (folder / "student.pth").exists()


@pytest.mark.parametrize(("name", "package"), [("host_lightning", "lightning"), ("host_transformers", "transformers")])
def test_hosts(folder, name, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install .[hosts])")
    printed = run(name, folder, 2)
    assert "icd_distill = " in printed and "2 batches, 2 steps" in printed


def test_ultralytics(folder):
    pytest.importorskip("ultralytics", reason="ultralytics is not installed (pip install .[hosts])")
    printed = run("host_ultralytics", folder, 1)
    assert "icd_distill = " in printed and "8 batches" in printed


@pytest.mark.parametrize(("name", "package"), [("detectron2", "detectron2"), ("mmdetection", "mmdet")])
@pytest.mark.parametrize("method", ["icd", "lgd"])
def test_hosts_that_cannot_be_installed_everywhere(folder, name, package, method, request, monkeypatch, capsys):
    if importlib.util.find_spec(package) is not None:
        printed = run(f"host_{name}", folder, 2, method)
    else:
        request.getfixturevalue(f"{name}_modules")
        monkeypatch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / f"host_{name}.py"))["main"](str(folder / "scenes"), 2, method)
        printed = capsys.readouterr().out
    assert f"{method}_distill" in printed and "2 batches, 2 steps" in printed
