"""`make gpu-check`: stages that fail, hang or time out do not stop others; every stage is rehearsed on the CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import check, results
from benchmarks.gpu.stages import Context, __main__, failures, host, ops, scenes, steps, windows
from benchmarks.gpu.stages.timing import measure

ROOT = Path(check.__file__).resolve().parents[2]
WRITE = "import json, os, pathlib; pathlib.Path(os.environ['FASTKD_STAGE_FILE']).write_text(json.dumps({'a': 1})); "


def planted(name, code, limit=20.0):
    return check.Stage(name, (sys.executable, "-c", code), limit)


def test_no_stage_ends_another(tmp_path):
    """Stages that raise, hang with a child, are killed, write no JSON, or succeed."""
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    stages = [
        planted("raises", WRITE + "raise RuntimeError('planted')"),
        planted("hangs", WRITE + child + "import time; time.sleep(60)", limit=3),
        planted("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        planted("garbled", "import os, pathlib; pathlib.Path(os.environ['FASTKD_STAGE_FILE']).write_text('{')"),
        check.Stage("missing", ("/nonexistent/python",), 5),
        planted("good", WRITE),
    ]
    begin = time.monotonic()
    found = check.run(stages, tmp_path, 5, device="cpu", toy=True)["stages"]
    assert time.monotonic() - begin < 50
    assert [found[stage.name]["status"] for stage in stages] == ["failed", "timeout", "failed", "ok", "failed", "ok"]
    assert found["raises"]["result"] == found["hangs"]["result"] == found["good"]["result"] == {"a": 1}
    assert "planted" in found["raises"]["log"] and found["killed"]["code"] == -9
    assert found["killed"]["result"] is None and found["garbled"]["result"] is None
    assert "/nonexistent/python" in found["missing"]["log"]
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["stages"] == json.loads(json.dumps(found)) and saved["device"] == "cpu"


def test_the_file_is_written_after_each_stage(tmp_path):
    """The second stage reads the file written after the first."""
    read = f"import json; found = json.load(open({str(tmp_path / 'gpu.json')!r}))['stages']; "
    read += "print(found['first']['status']); raise SystemExit(3)"
    found = check.run([planted("first", WRITE), planted("second", read)], tmp_path, 5)["stages"]
    assert found["second"]["log"].strip() == "ok" and found["second"]["code"] == 3


def test_no_stage_begins_after_the_minutes(tmp_path):
    found = check.run([planted("late", WRITE)], tmp_path, 0.01)["stages"]
    assert found["late"]["status"] == "skipped" and not (tmp_path / "late.json").exists()


def test_the_exit_status_tells_of_failures(tmp_path, monkeypatch):
    for code, status in (("pass", 0), ("raise SystemExit(2)", 1)):
        monkeypatch.setattr(check, "stages", lambda device, toy, code=code: [planted("versions", code)])
        assert check.main(["--out", str(tmp_path), "--device", "cpu"]) == status


def test_every_stage_has_a_limit_and_a_function():
    assert list(check.LIMITS) == list(__main__.STAGES)
    commands = {stage.name: stage.command for stage in check.stages("cpu", True)}
    assert all(command[3:] == (name, "--device", "cpu", "--toy") for name, command in commands.items())


def test_an_entry_that_raises_ends_no_other(tmp_path):
    context = Context("cpu", True, tmp_path / "stage.json")
    assert not context.attempt("bad", lambda: 1 / 0) and context.attempt("good", lambda: 3)
    saved = json.loads((tmp_path / "stage.json").read_text())
    assert saved == {"bad": {"error": "ZeroDivisionError: division by zero"}, "good": 3} and failures(saved) == ["bad"]


STAGES = {
    "versions": (host.versions, {"python", "packages", "cpu_kernels"}),
    "windows": (
        windows.windows,
        {"17 levels", "a level without cells", "no box", "box_paint_conv3x3 bfloat16, 7 objects"},
    ),
    "sanitizer": (host.sanitizer, {"skipped"}),
    "ops": (ops.ops, {"copy", "product bfloat16", "convolution float32", "instance_norm_mse", "masked_mse"}),
    "parts": (steps.parts, {"lgd ours", "icd ours", "lgd plain", "icd plain"}),
    "steps": (steps.steps, {"student plain bfloat16 B=1", "lgd ours bfloat16 B=1"}),
    "scenes": (scenes.scenes, {"pictures", "lgd", "icd"}),
}


TRAINED = ("steps", "scenes")


@pytest.fixture(scope="module")
def rehearsed():
    """The records of the stages so far, for the page."""
    return {}


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.long] * (x in TRAINED)) for x in STAGES])
def test_rehearsal(name, rehearsed, tmp_path):
    function, wanted = STAGES[name]
    context = Context("cpu", True, tmp_path / f"{name}.json", seconds=600)
    function(context)
    assert wanted <= set(context.found) and not failures(context.found), context.found
    rehearsed[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert rehearsed[name] == json.loads(json.dumps(context.found))


@pytest.mark.long  # all stages
def test_the_page_of_a_rehearsal(rehearsed, tmp_path):
    if set(rehearsed) != set(STAGES):
        pytest.skip("the stages ran in other processes")
    entry = {"status": "ok", "seconds": 1.0, "limit": 2.0}
    stages = {name: {**entry, "result": result} for name, result in rehearsed.items()}
    (tmp_path / "gpu.json").write_text(json.dumps({"device": "cpu", "toy": True, "minutes": 8, "stages": stages}))
    results.main([str(tmp_path / "gpu.json"), "--out", str(tmp_path / "gpu.md")])
    page = (tmp_path / "gpu.md").read_text()
    for name in ("instance_norm_mse", "lgd plain", "student plain bfloat16 B=1", "1 of 600"):
        assert name in page
    with pytest.raises(SystemExit, match="a rehearsal at toy sizes; give --out"):
        results.main([str(tmp_path / "gpu.json")])


def test_the_page_of_a_card():
    """Measured times beside PREDICTED ones; failures are listed with their reasons."""
    shape = {"images": 16, "height": 800, "width": 1344, "strides": [8, 16, 32, 64, 128]}
    sides = {"ours": {"wall_ms": 0.5, "graph_ms": 0.4}, "plain: a": {"wall_ms": 9.0}, "plain: b": {"graph_ms": 4.0}}
    bad = {"ours": {"wall_ms": 1.0}, "compiled": {"failed": "no | compiler"}}
    ops_found = {
        "copy": {"gb_per_s": 4000.0},
        "product bfloat16": {"tflop_per_s": 700.0},
        "instance_norm_mse": {"shape": shape, "sides": {**sides, "compiled": {"graph_ms": 2.0}}},
        "masked_mse": {"shape": shape, "sides": bad, "differs": "relative difference 1"},
        "mask_pool": {"error": "OutOfMemoryError: all gone"},
    }
    tests = {"outcomes": {"PASSED": 90, "FAILED": 1}, "failed": ["test_x[box_pool]"]}
    found = {
        "versions": {"commit": "abc", "card": {"name": "NVIDIA H200"}, "packages": {"torch": "2.11.0"}},
        "windows": {"good": "ok", "bad": {"error": "RuntimeError: invalid argument"}},
        "tests": tests,
        "sanitizer": {"memcheck box_pool": {"code": 0, "summary": "ERROR SUMMARY: 0 errors"}},
        "ops": ops_found,
        "steps": {"lgd ours bfloat16 B=16": {"wall_ms": 160.0, "images_per_s": 100.0, "peak_bytes": 2**31}},
    }
    stages = {name: {"status": "ok", "seconds": 1.0, "limit": 2.0, "result": result} for name, result in found.items()}
    stages["scenes"] = {"status": "skipped", "seconds": 0.0, "limit": 0.0, "result": None}
    page = results.page({"device": "cuda", "toy": False, "seconds": 470.0, "stages": stages})
    assert page.startswith("# Measured on NVIDIA H200\n")
    moved = 5 * 16 * 256 * sum(-(-800 // s) * -(-1344 // s) for s in shape["strides"]) * 2 / 4.8e12 * 1e3
    row = f"| instance_norm_mse | 0.400 | {moved:.3f} | {moved / 0.4:.0%} | 4.000 | 2.000 | 10.0 x | 5.0 x | 0.500 |  |"
    assert row in page
    assert "relative difference 1; compiled: no / compiler" in page and "OutOfMemoryError: all gone" in page
    assert "1 of 2 agree" in page and "bad: RuntimeError: invalid argument" in page and "test_x[box_pool]" in page
    assert "memcheck box_pool: ERROR SUMMARY: 0 errors" in page and "| scenes | skipped | 0 | none |" in page
    assert "| lgd ours bfloat16 B=16 | 160.00 | 100.0 | 2.00 |  |" in page


def test_programs_are_ended_with_their_children():
    code, output = host._run([sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"], 2)
    assert code == 124 and output.strip() == "begun"
    assert host._run(["/nonexistent/program"], 2)[0] == 127


def test_outcomes_are_read_from_any_order_of_words(monkeypatch, tmp_path):
    lines = ["[gw1] [ 50%] PASSED tests/ops/test_gpu.py::test_a[x] ", "tests/ops/test_gpu.py::test_b FAILED  [100%]"]
    monkeypatch.setattr(host, "_run", lambda *_, **__: (1, "\n".join([*lines, "E   assert False"])))
    context = Context("cpu", True)
    host.tests(context)
    assert context.found["outcomes"] == {"PASSED": 1, "FAILED": 1, "ERROR": 0, "SKIPPED": 0}
    assert context.found["failed"] == ["test_b"] and context.found["run"]["reasons"] == ["E   assert False"]


def test_a_call_is_timed_once_in_a_rehearsal():
    import torch

    calls = []
    found = measure(lambda: calls.append(1), torch.device("cpu"), 0.0)
    assert len(calls) == found["rounds"] == 1


def test_neither_tyro_nor_pycocotools_is_imported():
    code = """
import sys, importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tyro", "pycocotools"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
from benchmarks.gpu.stages import host, ops, scenes, steps, windows
from benchmarks.gpu import results, check
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_takes_the_interpreter_at_hand():
    command = ["make", "--no-print-directory", "-n", "gpu-check", "PYTHON=python9", "VENV=none", "OUT=somewhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "python9 -m benchmarks.gpu.check --device cuda --out somewhere"
