"""How setup.py finds the requirements of the GPU kernels, and its messages if they are missing or wrong.

The toolkits here are folders with a script for nvcc; nothing is compiled. The last tests look at the built library.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from sources import sources

from fastkd.ops._support import library

ROOT = Path(__file__).resolve().parents[2]
ALL_CARDS = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
VARIABLES = ("FASTKD_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The names defined by setup.py, in an environment without CUDA variables."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    names = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setitem(names["find_toolkit"].__globals__, "DEFAULT_TOOLKIT", tmp_path / "no default")
    return names


def toolkit(folder: Path, release="release 13.0, V13.0.88", cards=ALL_CARDS, runtime=True) -> Path:
    """A folder like a CUDA toolkit's."""
    answers = f'case "$1" in --version) echo "{release}" ;; --list-gpu-code) echo "{cards}" ;; esac'
    write_script(folder / "bin" / "nvcc", answers)
    if runtime:
        for file in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
            (folder / file).parent.mkdir()
            (folder / file).touch()
    return folder


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def refused(script, reason: str, monkeypatch, capsys) -> None:
    """Asserts that a build is refused with FASTKD_CUDA=1, and goes on without GPU kernels otherwise."""
    assert script["prepare_cuda"]() is None
    assert re.search(f"^fastkd: no GPU kernels are built: {reason}", capsys.readouterr().err)
    monkeypatch.setenv("FASTKD_CUDA", "1")
    with pytest.raises(SystemExit, match=f"^FASTKD_CUDA=1: {reason}"):
        script["prepare_cuda"]()
    monkeypatch.setenv("FASTKD_CUDA", "0")
    assert script["prepare_cuda"]() is None and capsys.readouterr().err == ""


def test_the_request_is_checked(script, monkeypatch):
    monkeypatch.setenv("FASTKD_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTKD_CUDA must be 0 or 1, got 'yes'; unset it to build GPU kernels where"):
        script["prepare_cuda"]()


def test_no_nvcc(script, monkeypatch, capsys):
    refused(script, "no nvcc was found; install the CUDA toolkit, or set CUDA_HOME", monkeypatch, capsys)


def test_torch_without_cuda(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    monkeypatch.setattr(torch.version, "cuda", None)
    refused(script, r"torch .* is built without CUDA; install a CUDA build of torch", monkeypatch, capsys)


def test_another_major_version(script, monkeypatch, capsys, tmp_path):
    home = toolkit(tmp_path / "cuda", release="release 12.8, V12.8.93")
    monkeypatch.setenv("CUDA_HOME", str(home))
    reason = (
        f"torch .* is built for CUDA 13.0, {home} holds CUDA 12.8; "
        "set CUDA_HOME to a toolkit 13.x, or install a torch for CUDA 12"
    )
    refused(script, reason, monkeypatch, capsys)


def test_another_minor_version_will_do(script, monkeypatch, tmp_path):
    home = toolkit(tmp_path / "cuda", release="release 13.2, V13.2.1")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert script["prepare_cuda"]()[0] == home


def test_cuda_home_without_nvcc(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    refused(script, f"CUDA_HOME={tmp_path} has no bin/nvcc; point it to", monkeypatch, capsys)


def test_a_compiler_without_runtime(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", runtime=False)))
    refused(script, r".* lacks include/cuda_runtime.h or libcudart_static.a; install", monkeypatch, capsys)


def test_an_nvcc_that_tells_no_version(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", release="broken")))
    refused(script, r".*nvcc --version names no release, got 'broken'; set CUDA_HOME", monkeypatch, capsys)


def test_a_wrapper_on_the_path_leads_to_its_toolkit(script, tmp_path):
    home = toolkit(tmp_path / "cuda")
    write_script(tmp_path / "bin" / "nvcc", f"echo '#$ _SPACE_= ' >&2; echo '#$ TOP={home}/bin/..' >&2")
    assert script["prepare_cuda"]()[0] == home


def test_a_wrapper_that_tells_nothing(script, monkeypatch, capsys, tmp_path):
    write_script(tmp_path / "bin" / "nvcc", "exit 1")
    refused(script, f"{tmp_path}/bin/nvcc does not say where its toolkit is; set CUDA_HOME", monkeypatch, capsys)


@pytest.mark.parametrize(
    ("wanted", "cards", "expected"),
    [
        (None, ALL_CARDS, ["80 sm_80", "80 sm_90", "80 sm_100", "80 compute_80"]),
        (None, "sm_80 sm_90", ["80 sm_80", "80 sm_90", "80 compute_80"]),  # before CUDA 12.8
        ("8.6", ALL_CARDS, ["86 sm_86"]),
        ("8.0;9.0+PTX", ALL_CARDS, ["80 sm_80", "90 sm_90", "90 compute_90"]),
        ("10.0, 12.0", ALL_CARDS, ["100 sm_100", "120 sm_120"]),
    ],
)
def test_cards(script, monkeypatch, tmp_path, wanted, cards, expected):
    if wanted is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    found = script["targets"](toolkit(tmp_path / "cuda", cards=cards))
    assert [" ".join(pair) for pair in found] == expected


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("Hopper", r'TORCH_CUDA_ARCH_LIST must be versions such as "8.0;9.0\+PTX", got \'Hopper\'; correct it'),
        ("8.0;6.1", r"TORCH_CUDA_ARCH_LIST names 6.1, .*nvcc knows 75 80 86 90 100 120; take cards of these or"),
    ],
)
def test_cards_that_cannot_be(script, monkeypatch, capsys, tmp_path, wanted, reason):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    refused(script, reason, monkeypatch, capsys)


def test_the_extension_gets_the_static_runtime_and_the_targets(script, tmp_path):
    home = toolkit(tmp_path / "cuda")
    extension, pairs = script["extension"]("fastkd._cuda", "csrc/*/*.cu"), [("80", "sm_90"), ("80", "compute_80")]
    made = script["complete"](extension, home, pairs)
    assert "cudart_static" in made.libraries and "cudart" not in made.libraries
    assert made.library_dirs[-1] == str(home / "lib64") and "csrc/normalised/instance_norm_mse.cu" in made.sources
    flags = made.extra_compile_args["nvcc"]
    assert {"-gencode=arch=compute_80,code=sm_90", "-DFASTKD_CUDA_TARGETS=sm_90.compute_80"} <= set(flags)


# the sources

RUNTIME = {  # none of them allocates, waits, or is refused while a CUDA graph is captured
    "cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetLastError", "cudaGetErrorString",
}  # fmt: skip


def test_the_sources_allocate_nothing_and_wait_for_nothing():
    paths = sources("*.cu", "device*.h", "*_device.h")
    text = "\n".join(re.sub(r"//.*", "", path.read_text(encoding="utf-8")) for path in paths)
    called = set(re.findall(r"\b(cuda[A-Z]\w*)\(", text))
    assert called == RUNTIME
    assert not re.findall(r"\b(?:malloc|new|atomicAdd|printf)\b(?! tensor)", text)


# the built library

built = pytest.mark.skipif(not library.BUILT_IN_CUDA.exists(), reason="fastkd/_cuda.so is not built: `make cuda`")


@built
def test_the_library_needs_torch_and_no_toolkit():
    command = ["readelf", "-d", library.BUILT_IN_CUDA]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", output))
    assert "libtorch_cuda.so" in needed
    assert not [name for name in needed if re.match(r"libcuda|libcudart|libpython|libtorch_python", name)]


@built
def test_the_library_loads_without_gpu_and_driver():
    code = "from fastkd.ops._support import library; print(library.why_no_cuda(), library.cuda_build())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.match(r"None sm_\d+.*, headers of torch .*, compiled by nvcc \d+\.\d+", done.stdout)
    assert done.stderr == ""


@built
def test_the_library_has_a_kernel_of_every_op_in_its_sources():
    assert library.why_no_cuda() is None
    for source in sources("*.cu"):
        for name in re.findall(r'library\.impl\("(\w+)"', source.read_text(encoding="utf-8")):
            assert name == "cuda_build" or library._has_cuda_kernel(name), f"{source.name}: {name}; run `make cuda`"
