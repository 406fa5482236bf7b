"""Stages that run other programs: versions, the build, the tests, compute-sanitizer."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.environment import commit
from benchmarks.gpu import card
from benchmarks.gpu.stages import Context
from fastkd.ops._support import library

PACKAGES = ("torch", "torchvision", "triton", "numpy", "scipy", "setuptools", "ninja", "pytest", "pytest-xdist", "timm")
CHECKED = ("box_pool", "norm_relu_box_pool", "instance_norm_mse", "value_mimic", "box_paint_conv3x3", "masked_mse")
TAIL = 1500  # recorded characters of a program's output
BUILD_CPU = ("build_ext", "--inplace", "--build-temp", "build/gpu-check-cpu")
BUILD_CUDA = ("build_ext", "--inplace", "--only-cuda", "--build-temp", "build/gpu-check-cuda")


def _run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit status and output; 124 if the program and its children were killed after `seconds`."""
    with tempfile.TemporaryFile() as file:  # a surviving child would keep a pipe open
        try:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        except OSError as error:
            return 127, str(error)
        try:
            code = process.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = 124
        file.seek(0)
        return code, file.read().decode(errors="replace")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(context: Context) -> None:
    """Python, packages, toolkit, driver, card."""
    context.record("python", platform.python_version())
    context.record("commit", commit())
    context.record("packages", {name: _version(name) for name in PACKAGES})
    context.record("cpus", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    context.record("torch_cuda", torch.version.cuda)
    context.record("nvcc", _run(["nvcc", "--version"], 10)[1].strip()[-200:])
    context.attempt("cpu_kernels", lambda: library.why_not_loaded() or library.cpu_build())
    if context.device != "cuda":
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv"]
    context.record("nvidia_smi", _run(query, 10)[1].strip())
    context.attempt("card", _card)


def _card() -> dict[str, Any]:
    reason = card.why_no_card()
    if reason is not None:
        raise RuntimeError(reason)
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": [found.major, found.minor],
        "processors": found.multi_processor_count,
        "memory_gib": found.total_memory / 2**30,
        "l2_mib": getattr(found, "L2_cache_size", 0) / 2**20,
    }


def build(context: Context) -> None:
    """Build the CPU library, unless present, and the GPU kernels for this card only, in parallel."""
    wanted = {}
    if library.why_not_loaded() is not None:
        wanted["cpu"] = (BUILD_CPU, {"FASTKD_CUDA": "0"})
    if context.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        wanted["cuda"] = (BUILD_CUDA, {"FASTKD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"})

    def make(name: str) -> dict[str, Any]:
        command, environment = wanted[name]
        seconds = context.left
        code, output = _run([sys.executable, "setup.py", "--quiet", *command], seconds, **environment)
        print(output, flush=True)
        result = {"code": code, "seconds": seconds - context.left}
        return result if code == 0 else {**result, "error": output[-TAIL:] or f"exit status {code}"}

    with ThreadPoolExecutor(2) as pool:
        for name, result in zip(wanted, pool.map(make, wanted)):
            context.record(name, result)
    check = "from fastkd.ops._support import library as l; print(l.why_not_loaded()); print(l.why_no_cuda())"
    code, output = _run([sys.executable, "-c", check], 60)
    told = output.strip().splitlines()[-2:] if code == 0 else [output[-TAIL:]] * 2
    context.record("loads", {"cpu": told[0], "cuda": told[-1]})


def tests(context: Context) -> None:
    """Tests of every op against the reference, ten draws each, in parallel: tests/ops/test_gpu.py."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "-o", "addopts="]
    if context.toy:
        command += ["-k", "test_the_harness_on_the_cpu and (masked_mse or imitation_mask)"]
    else:
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal", "-m", "gpu"]
    environment = {"FASTKD_GPU_CALLS": "10", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    code, output = _run([*command, "tests/ops/test_gpu.py"], context.left, **environment)
    print(output, flush=True)
    outcomes = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0)
    failed = set()
    for line in output.splitlines():
        # without xdist: "name PASSED [ 5%]"; under xdist: "[gw0] [ 5%] PASSED name"
        name = re.search(r"tests/ops/test_gpu\.py::(\S+)", line)
        outcome = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if name and outcome and ("%]" in line):
            outcomes[outcome[1]] += 1
            failed |= {name[1]} if outcome[1] in ("FAILED", "ERROR") else set()
    context.record("outcomes", outcomes)
    context.record("failed", sorted(failed))
    if code != 0 or not outcomes["PASSED"]:
        reasons = [line for line in output.splitlines() if line.startswith("E  ")]
        context.record("run", {"error": f"pytest ended with {code}", "reasons": reasons[:60], "tail": output[-TAIL:]})


def sanitizer(context: Context) -> None:
    """Memcheck and racecheck of a few ops, one process each, several in parallel."""
    tool = card.sanitizer()
    if context.device != "cuda" or tool is None:
        context.record("skipped", "no GPU is asked for" if context.device != "cuda" else "no compute-sanitizer")
        return
    calls = [(check, op) for op in CHECKED for check in ("memcheck", "racecheck")]
    environment = {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "FASTKD_GPU_CALLS": "2",
        "FASTKD_POISON": "0",
        "OMP_NUM_THREADS": "1",
    }

    def check(call: tuple[str, str]) -> dict[str, Any]:
        command = [tool, "--tool", call[0], "--error-exitcode", "1", sys.executable, "-m", "pytest", "-q", "-x"]
        command += ["-p", "no:cacheprovider", "-o", "addopts=", "tests/ops/test_gpu.py"]
        code, output = _run([*command, "-k", f"test_no_worse_than_plain and {call[1]}"], context.left, **environment)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", output)
        result = {"code": code, "summary": summary[-1] if summary else None}
        return result if code == 0 else {**result, "error": output[-TAIL:]}

    with ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        for call, result in zip(calls, pool.map(check, calls)):
            context.record(" ".join(call), result)
