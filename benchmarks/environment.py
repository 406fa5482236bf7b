"""The environment of a benchmark: commit, machine, allocator settings."""

from __future__ import annotations

import os
import platform
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import torch

from fastkd import ops
from fastkd.ops._support import library

# glibc returns large blocks to the system and faults them in again, a tenth of a step's time at these sizes
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


ROOT = Path(__file__).resolve().parents[1]


def _git(folder: Path, *command: str) -> str | None:
    done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=folder)
    return done.stdout.strip() if done.returncode == 0 else None


def commit(folder: Path = ROOT) -> str:
    """First digits of a checkout's commit, with "+" where the tree differs from it in more than its results."""
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ":(top,exclude)docs/results")
    return (_git(folder, "rev-parse", "HEAD") or "unknown")[:12] + ("+" if changed else "")


def wrap(text: str) -> str:
    """A paragraph of a results page, in lines of at most 120 characters."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def machine(device: torch.device) -> dict[str, Any]:
    """Machine and software versions of a measurement."""
    names = [name for name in ops.__all__ if f"{name}_reference" in ops.__all__]
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "capability": library.cpu_capability(),
        "torch": torch.__version__,
        "kernels": {name: library.has_kernel(name, device.type) for name in names},
        "allocator": {name: os.environ.get(name, value) for name, value in KEEP_MEMORY.items()},
    }
