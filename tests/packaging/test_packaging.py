"""Build and distribution: metadata, source distribution, the compiled library, the CMake build, `fastkd info`."""

import importlib.metadata
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch
from rich.console import Console
from sources import sources

import fastkd
from fastkd import info
from fastkd.ops._support import library

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
CMAKE_BUILD = ROOT / "build" / "cmake"
BF16 = "#define FASTKD_BF16_KERNELS"


def requirements():
    return importlib.metadata.requires("fastkd")


@pytest.fixture
def setup_script(monkeypatch):
    """The names setup.py defines."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_versions_agree():
    assert re.search(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE).group(1) == fastkd.__version__
    assert importlib.metadata.version("fastkd") == fastkd.__version__
    assert f"## {fastkd.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_metadata():
    metadata = importlib.metadata.metadata("fastkd")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "dynamic" not in PYPROJECT
    names = {re.split(r"[<>=!; ]", requirement)[0] for requirement in requirements() if "extra ==" not in requirement}
    expected = "torch torchvision numpy scipy pillow pycocotools tyro rich tensorboard matplotlib safetensors"
    assert names == set(expected.split())
    scripts = importlib.metadata.entry_points(group="console_scripts", name="fastkd")
    assert [script.value for script in scripts] == ["fastkd.cli:main"]


def test_a_build_without_torch_says_what_to_do():
    blocked = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pip install 'torch>=2.10' numpy ninja first, or leave out --no-build-isolation" in done.stderr


def test_no_version_is_capped():
    build = re.search(r"^requires = \[(.*)\]$", PYPROJECT, re.MULTILINE).group(1)
    assert '"torch' in build
    for requirement in [*requirements(), build]:
        assert not re.search(r"<|~=|==", requirement.split(";")[0]), requirement


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for path in (ROOT / "fastkd").rglob("*.py")}
    assert {folder.relative_to(ROOT) for folder in folders if not (folder / "__init__.py").exists()} == set()


def test_the_wheel_depends_on_the_platform_alone():
    installed = [one.read_text("WHEEL") for one in importlib.metadata.distributions(name="fastkd")]
    tags = re.findall(r"^Tag: (.*)$", "".join(filter(None, installed)), re.MULTILINE)  # an egg-info has no WHEEL
    assert len(tags) == 1 and re.fullmatch(r"py310-none-(?!any).*", tags[0])


def test_source_distribution_is_complete(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(tmp_path / f"fastkd-{fastkd.__version__}.tar.gz") as archive:
        shipped = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"LICENSE", "CHANGELOG.md", "CMakeLists.txt", "Makefile", "pyproject.toml", "setup.py", ".ci/run"}
    patterns = ("csrc/*/*.cpp", "csrc/*/*.cu", "csrc/*/*.h", "fastkd/**/*.py", "fastkd/assets/*", "tests/**/*.py")
    for pattern in (*patterns, "benchmarks/**/*.py"):
        wanted |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern) if path.is_file()}
    assert wanted - shipped == set()
    assert not [name for name in shipped if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize("path", [ROOT / "fastkd" / "_cpu.so", CMAKE_BUILD / "_cpu.so", library.BUILT_IN_CUDA])
def test_the_library_needs_the_stable_abi_alone(path):
    if path == library.BUILT_IN_CUDA and not path.exists():
        pytest.skip("fastkd/_cuda.so is not built: `make cuda`")
    assert path.exists(), "run `make build cmake`"
    command = ["nm", "-D", "-C", path]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    undefined = {line.split(" U ", 1)[1].split("@")[0] for line in symbols if " U " in line}
    assert any(name.startswith("torch_") for name in undefined)
    assert [name for name in undefined if re.search(r"\b(c10|at|torch|caffe2)::", name)] == []
    assert [name for name in undefined if name.startswith(("Py", "_Py"))] == []
    assert [line for line in symbols if "PyInit" in line] == []


@pytest.mark.parametrize("capability", [1, 2, 3])
def test_no_inline_function_is_compiled_for_more_than_the_baseline(capability):
    """A weak symbol of an AVX unit could be the one the linker keeps, and crash an older CPU from generic code."""
    name = {1: "avx2", 2: "avx512", 3: "avx512_bf16"}[capability]
    compiled = [path for path in sources("*.cpp") if capability < 3 or BF16 in path.read_text()]
    units = [unit for path in compiled for unit in (ROOT / "build" / "objects").rglob(f"{path.stem}_{name}.o")]
    assert len(units) == len(compiled), "run `make clean build`"
    if not units:
        return  # no source has kernels of this instruction set: checked above
    output = subprocess.run(["nm", "-C", *units], check=True, capture_output=True, text=True).stdout
    assert [line for line in output.splitlines() if re.search(r" [WVu] ", line)] == []


def test_cmake_compiles_what_setup_does(setup_script, tmp_path):
    """`make test` links the objects of pip's build; C++ users compile the same sources with the same options."""
    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-GUnix Makefiles"]
    subprocess.run([cmake, "-S", ROOT, "-B", tmp_path, *options], check=True, capture_output=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    found = [(Path(one["file"]), int(re.search(r"FASTKD_CAPABILITY=(\d)", one["command"])[1])) for one in commands]
    numbers = setup_script["CAPABILITIES"].values()
    expected = {(path, n) for path in sources("*.cpp") for n in numbers if n < 3 or BF16 in path.read_text()}
    assert set(found) == expected and len(found) == len(expected)
    wanted = {one for one in setup_script["COMPILE_ARGS"] if one.startswith(("-O", "-f", "-D", "-W"))}
    for one in commands:
        assert wanted - set(one["command"].split()) == set(), one["file"]
    unit = "csrc/common/capability.cpp.o"
    subprocess.run([cmake, "--build", tmp_path, "--target", unit], check=True, capture_output=True)
    assert len(list(tmp_path.rglob("capability.cpp.o"))) == 3


def run_python(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_cmake_library_computes_the_same():
    code = """
import torch
from fastkd.ops import instance_norm_mse, instance_norm_mse_reference
from fastkd.ops._support import library
assert library.why_not_loaded() is None
student, teacher = ([torch.randn(2, 5, 9, 7)] for _ in range(2))
torch.testing.assert_close(instance_norm_mse(student, teacher), instance_norm_mse_reference(student, teacher))
with open("/proc/self/maps") as maps:
    print({line.split()[-1] for line in maps if line.rstrip().endswith("_cpu.so")})
"""
    built = CMAKE_BUILD / "_cpu.so"
    result = run_python(code, FASTKD_CPU_LIBRARY=str(built))
    assert result.returncode == 0, result.stderr
    assert str(built) in result.stdout and str(library.BUILT_IN) not in result.stdout


def test_a_library_that_cannot_be_loaded_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "_cpu.so"
    broken.write_text("not a library")
    for path in (broken, tmp_path / "none.so"):
        monkeypatch.setenv("FASTKD_CPU_LIBRARY", str(path))
        with pytest.raises(ImportError, match=f"fastkd: {path} cannot be loaded .*; it needs torch >= 2.10"):
            library.why_not_loaded.__wrapped__()


def test_without_a_library_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTKD_CPU_LIBRARY", raising=False)
    monkeypatch.setattr(library, "BUILT_IN", tmp_path / "_cpu.so")
    assert "not built; run `make build`" in library.why_not_loaded.__wrapped__()


def test_parallel_jobs_fit_the_free_memory(setup_script, monkeypatch):
    jobs = setup_script["parallel_jobs"]
    names = jobs.__globals__
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64), raising=False)
    for free, expected in ((100e6, 1), (8 * 2**30, 5), (float("inf"), 64)):
        monkeypatch.setitem(names, "available_memory", lambda free=free: free)
        assert jobs() == expected


def test_info_is_complete_and_serialisable():
    collected = json.loads(json.dumps(info.collect()))
    assert collected["fastkd"] == fastkd.__version__
    assert collected["packages"]["torch"] == torch.__version__
    assert collected["cpu"]["capability"] == library.cpu_capability()
    assert "stable ABI of torch 2.10" in collected["cpu"]["build"]
    assert collected["ops"]["instance_norm_mse"]["cpu"] == "compiled"
    assert {where["cpu"] for where in collected["ops"].values()} == {"compiled"}


def test_info_prints_with_a_wrong_capability(monkeypatch):
    monkeypatch.setenv("FASTKD_CPU_CAPABILITY", "sse2")
    console = Console(file=io.StringIO(), width=200)
    info.print_info(console)
    assert "FASTKD_CPU_CAPABILITY must be" in console.file.getvalue()
    assert "instance_norm_mse" in console.file.getvalue()


@pytest.mark.parametrize(("name", "tests"), [("run", "make test"), ("release", "make test-long")])
def test_ci_runs_lint_docs_and_tests(name, tests):
    script = ROOT / ".ci" / name
    assert os.access(script, os.X_OK)
    assert {"set -euo pipefail", "make lint", "make docs", tests} <= set(script.read_text().splitlines())
