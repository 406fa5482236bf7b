"""Checks the contents of a wheel: `python -m benchmarks.wheel dist/fastkd-*.whl`, at the end of `make wheel`.

It must be smaller than 50 MB, contain machine code for 8.0, 9.0, 10.0 and PTX, and load both libraries in a process
without a GPU. Needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from benchmarks.gpu.report import cuobjdump, run

LIMIT = 50_000_000  # bytes
CARDS = {"sm_80", "sm_90", "sm_100"}
LOAD = """
from fastkd.ops._support import library
for reason in (library.why_not_loaded(), library.why_no_cuda()):
    assert reason is None, reason
print(library.__file__, "|", library.cuda_build())
"""


def check(wheel: Path) -> tuple[list[str], list[str]]:
    """Lines on the contents of the wheel, and lines on its faults."""
    facts, wrong = [f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB"], []
    if wheel.stat().st_size >= LIMIT:
        wrong.append(f"the wheel must be under {LIMIT / 1e6:.0f} MB")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        libraries = [Path(folder) / "fastkd" / name for name in ("_cpu.so", "_cuda.so")]
        for library in libraries:
            if not library.is_file():
                return facts, [*wrong, f"fastkd/{library.name} is missing"]
            packed = archive.getinfo(f"fastkd/{library.name}").compress_size
            facts.append(f"fastkd/{library.name}: {library.stat().st_size / 1e6:.1f} MB, {packed / 1e6:.1f} MB packed")
        listed = (run(cuobjdump(), option, libraries[1]) for option in ("--list-elf", "--list-ptx"))
        machine_code, ptx = (set(re.findall(r"\.(sm_\d+)\.", lines)) for lines in listed)
        facts.append(f"machine code: {' '.join(sorted(machine_code))}; PTX: {' '.join(sorted(ptx))}")
        if CARDS - machine_code or not ptx:
            wrong.append(f"machine code for {' '.join(sorted(CARDS))} and PTX must be there")
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": folder}
        command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", LOAD]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not done.stdout.startswith(folder):
            wrong.append(f"the libraries do not load without a GPU: {done.stdout}{done.stderr}")
        else:
            facts.append(f"loads without a GPU: {done.stdout.split('|')[1].strip()}")
    return facts, wrong


def main(arguments: list[str] | None = None) -> int:
    """Print both; 1 if there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    facts, wrong = check(parser.parse_args(arguments).wheel)
    print("\n".join(facts + [f"WRONG: {line}" for line in wrong]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
