"""The wheel on other Pythons and torches: python -m benchmarks.any_machine --environments python3.10=2.10.0.

Builds a wheel without GPU kernels, installs it into a fresh environment for each PYTHON[=TORCH] (the newest torch
without one) and runs the tests of the ops there; runs them in this environment with every FASTKD_CPU_CAPABILITY of this
CPU; and asks pip to build the project where there is no torch. Figures go to docs/results/any-machine.json and .md; a
row that is there is not made again unless --again is given. Downloads torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, commit
from fastkd.files import write_json, write_text
from fastkd.ops._support import library

RESULTS = ROOT / "docs/results"
# The emulation of CUDA is compiled for one Python; launch checks and planted bugs need it.
TESTS = [
    "tests/ops", "--ignore-glob=tests/ops/*_cuda.py", "--ignore-glob=tests/ops/test_simt*",
    "--ignore=tests/ops/test_launch_checks.py", "--ignore=tests/ops/test_planted_bugs.py",
]  # fmt: skip
WITHOUT_TORCH = "without torch"
VERSIONS = "import platform, torch; print(platform.python_version(), torch.__version__)"


def run(command: list[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """A command with its output as text."""
    return subprocess.run(
        list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def checked(command: list[str | Path], **options: Any) -> str:
    """The output of a command. Raises: RuntimeError with it if the command fails."""
    done = run(command, **options)
    if done.returncode:
        raise RuntimeError(f"any_machine: {' '.join(map(str, command))} failed: {done.stdout[-3000:]}")
    return done.stdout


def sources(folder: Path) -> Path:
    """The committed tree."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def build_wheel(work: Path) -> Path:
    """The wheel, built by this Python; its objects are kept for the next build."""
    tree, environment = sources(work / "source"), dict(os.environ, FASTKD_CUDA="0")
    environment.setdefault("FASTKD_OBJECTS", str(ROOT / "build/objects"))
    out = work / "wheel"
    shutil.rmtree(out, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    checked([*pip, "--wheel-dir", out, tree], env=environment)
    return next(out.glob("*.whl"))


def capabilities() -> list[str]:
    """The instruction sets that this CPU and build have."""
    found, before = [], os.environ.pop("FASTKD_CPU_CAPABILITY", None)
    for name in ("generic", "avx2", "avx512", "avx512_bf16"):
        os.environ["FASTKD_CPU_CAPABILITY"] = name
        with contextlib.suppress(RuntimeError):
            found += [name] if library.cpu_capability() == name else []
    del os.environ["FASTKD_CPU_CAPABILITY"]
    if before is not None:
        os.environ["FASTKD_CPU_CAPABILITY"] = before
    return found


def op_tests(python: str | Path, folder: Path, *options: str, **environment: str) -> dict[str, Any]:
    """Runs the tests of the ops with these options of pytest; counts and seconds."""
    begin = time.monotonic()
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *TESTS], cwd=folder, env=variables)
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-500:])
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if not counts:
        failed = [done.stdout[-1000:]]
    return {**counts, "problems": failed[:20], "seconds": time.monotonic() - begin}


def environment(name: str, wheel: Path, work: Path) -> dict[str, Any]:
    """The wheel in a fresh environment. Args: name: PYTHON or PYTHON=TORCH."""
    interpreter, _, torch = name.partition("=")
    folder = work / "environment"
    shutil.rmtree(folder, ignore_errors=True)
    checked([interpreter, "-m", "venv", folder])
    python = folder / "bin/python"
    wanted = ["torch" if not torch else f"torch=={torch}", wheel, "pytest", "pytest-benchmark"]
    checked([python, "-m", "pip", "install", "--quiet", *wanted])
    tree = sources(work / "tests")
    shutil.rmtree(tree / "fastkd")  # the tests must take the installed package
    row = op_tests(python, tree)
    row["python"], row["torch"] = checked([python, "-c", VERSIONS]).split()
    shutil.rmtree(folder)
    return row | {"wheel": wheel.name}


def without_torch(work: Path) -> dict[str, Any]:
    """pip's message for a build without isolation in an environment that has no torch."""
    folder = work / "empty"
    shutil.rmtree(folder, ignore_errors=True)
    checked([sys.executable, "-m", "venv", folder])
    checked([folder / "bin/python", "-m", "pip", "install", "--quiet", "setuptools>=77", "wheel", "numpy", "ninja"])
    pip = [folder / "bin/python", "-m", "pip", "install", "--no-build-isolation", "--no-deps", sources(work / "source")]
    done = run(pip)
    said = next((line.strip() for line in done.stdout.splitlines() if "torch" in line), done.stdout[-300:])
    helped = done.returncode and "pip install" in said
    return {"said": said, "problems": [] if helped else [done.stdout[-1500:]]}


def main() -> int:
    """Make the rows that are missing; returns 1 if any shows a problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", nargs="*", default=[], metavar="PYTHON[=TORCH]")
    parser.add_argument("--capabilities", nargs="*", default=capabilities(), help="of this CPU")
    parser.add_argument("--work", type=Path, default=ROOT / "build/any-machine")
    parser.add_argument("--out", type=Path, default=RESULTS / "any-machine.json")
    parser.add_argument("--again", action="store_true", help="make rows again that are there")
    options = parser.parse_args()
    figures = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    jobs = {f"FASTKD_CPU_CAPABILITY={name}": name for name in options.capabilities}
    wheel: Path | None = None
    for name in [*options.environments, *jobs, WITHOUT_TORCH]:
        if name in figures and not options.again:
            continue
        if name == WITHOUT_TORCH:
            row = without_torch(options.work)
        elif name in jobs:
            row = op_tests(sys.executable, ROOT, "--long", FASTKD_CPU_CAPABILITY=jobs[name])
            row["python"], row["torch"] = checked([sys.executable, "-c", VERSIONS]).split()
        else:
            wheel = wheel or build_wheel(options.work)
            row = environment(name, wheel, options.work)
        figures[name] = row | {"commit": commit()}
        write_json(options.out, figures)
        print(f"{name}: {row}", flush=True)
    write_text(options.out.with_suffix(".md"), page(figures))
    return int(any(row["problems"] for row in figures.values()))


def page(figures: dict[str, Any]) -> str:
    """The page of the figures."""
    rows = "".join(
        f"| {name} | {row['python']} | {row['torch']} | {row.get('passed', 0):,} | {row.get('skipped', 0)} | "
        f"{len(row['problems'])} | {row['seconds'] / 60:.1f} min | {row['commit']} |\n"
        for name, row in figures.items()
        if name != WITHOUT_TORCH
    )
    said = figures.get(WITHOUT_TORCH, {}).get("said", "not tried")
    return (
        "# Any machine\n\n`make any-machine` (python -m benchmarks.any_machine; figures in any-machine.json). An "
        "environment PYTHON=TORCH is fresh and has the wheel of this commit, built once by the project's own Python; a "
        "row FASTKD_CPU_CAPABILITY runs in the project's environment, with all parameter sets (`--long`), and keeps "
        "the kernels to the instructions of an older CPU. The tests are those of the ops, without those of the CUDA "
        "emulation.\n\n"
        "| environment | Python | torch | passed | skipped | failed | time | commit |\n"
        f"|---|---|---|--:|--:|--:|--:|---|\n{rows}\n"
        f"`pip install --no-build-isolation .` where there is no torch says: `{said}`\n"
    )


if __name__ == "__main__":
    sys.exit(main())
