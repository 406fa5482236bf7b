"""A tiny run that takes about a second, its reference result, and processes forked from one that has imported torch."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import io
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastkd import cli
from fastkd.data import generate_scenes
from fastkd.detectors import DetectorConfig, build_detector, save_detector
from fastkd.training import DataConfig, OptimizerConfig, Recipe, RuntimeConfig, Schedule, get_recipe, train

PATIENCE = 120.0  # seconds after which a run counts as hanging
TIMED = ("images_per_second", "seconds_per_step", "data_seconds", "data_wait", "loader_images_per_second")
CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_REMOUNT, MS_RDONLY = 0x20000, 0x4000, 0x40000, 0x20, 0x1


def make_data(root: Path) -> Path:
    """Two dozen generated scenes."""
    generate_scenes(root, train=20, val=6, seed=3, processes=1)
    return root


def detector(width: float = 0.125) -> DetectorConfig:
    """A RetinaNet of a few thousand weights, without the batch statistics that belong to one process."""
    return DetectorConfig(
        "retinanet", 10, "resnet18", width=width, channels=32, norm="frozen_bn", head_norm="gn", head_convs=1,
        candidates_per_level=50, detections_per_image=10,
    )  # fmt: skip


def recipe(data: Path, method: str = "fgfi", *, batch_size: int = 2, steps: int = 8, workers: int = 1) -> Recipe:
    """The run of the campaign: loader processes, a checkpoint every second step, an evaluation in the middle.

    FGFI, because its checkpoints are small (3 MB; LGD's have 37 MB) and it has a teacher.
    """
    named = get_recipe(f"scenes-retinanet-{method}")
    return dataclasses.replace(
        named,
        detector=detector(),
        data=DataConfig(
            root=str(data), short_sides=(48, 64), val_short_side=64, max_side=96, val_batch_size=4, workers=workers
        ),
        teacher=str(teacher(data)) if named.teacher else None,
        backbone_weights=None,
        optimizer=OptimizerConfig(learning_rate=0.02, clip_norm=10.0, warmup=0.1),
        schedule=Schedule(steps=steps, batch_size=batch_size),
        runtime=RuntimeConfig(
            precision="float32", log_every=1, checkpoint_every=2, keep_last=3, eval_every=4, ledger_pairs=0
        ),
    )


def teacher(data: Path, seed: int = 7) -> Path:
    """The file of an untrained, wider teacher."""
    path = data.with_name(f"{data.name}-teacher-{seed}.safetensors")
    if not path.exists():
        torch.manual_seed(seed)
        content = json.loads((data / "annotations/train.json").read_text(encoding="utf-8"))
        save_detector(build_detector(detector(0.25)), path, [c["name"] for c in content["categories"]])
    return path


def run(wanted: Recipe, run_dir: Path) -> int:
    """Trains or resumes in this process; returns the exit code."""
    return train(wanted, run_dir, resume=True, device="cpu", console=Console(file=io.StringIO())).exit_code


def result(run_dir: Path) -> dict[str, Any]:
    """Content common to equal runs: digests of weights and optimiser states, log without times, file names."""
    newest = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    files = [*newest.glob("*.safetensors"), *run_dir.glob("*.safetensors"), run_dir / "detections.json"]
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()]
    earlier = re.compile(r"checkpoints/step_\d+/")  # a run that was stopped has kept others
    names = [name for name in names if not earlier.match(name) or name.startswith(f"checkpoints/{newest.name}/")]
    return {
        "digests": {str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)},
        "log": [{key: value for key, value in line.items() if key not in TIMED} for line in lines],
        "files": sorted(name for name in names if not name.startswith("tensorboard/")),
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first difference of two results; "" if they are equal."""
    for key in one:
        if one[key] != other[key]:
            return f"{key}: {one[key]} against {other[key]}"[:2000]
    return ""


def fork(function: Callable[[], int | None], output: Path) -> int:
    """Calls the function in a forked process that leads a session of its own; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", closefd=False) for number in (1, 2)
        )  # the parent's may be others
        code = function() or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, patience: float = PATIENCE) -> int:
    """Exit code of a forked process, -signal if a signal ended it; kills it after `patience` seconds."""
    descriptor = os.pidfd_open(pid)
    try:
        if not select.select([descriptor], [], [], patience)[0]:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a forked process ended. Args: code: exit code; said: its output; seconds: its time."""

    code: int
    said: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line of the output."""
        lines = self.said.strip().splitlines()
        return lines[-1] if lines else ""


def call(function: Callable[[], int | None], patience: float = PATIENCE) -> Ended:
    """Calls the function in a forked process and waits for it."""
    with tempfile.TemporaryDirectory() as folder:
        output, begin = Path(folder) / "output", time.perf_counter()
        code = wait(fork(function, output), patience)
        return Ended(code, output.read_text(encoding="utf-8", errors="replace"), time.perf_counter() - begin)


def command(*args: str | Path, before: Callable[[], None] | None = None) -> Ended:
    """A `fastkd` command in a forked process. Args: before: called there first."""

    def run_it() -> int:
        if before is not None:
            before()
        return cli.main([str(arg) for arg in args])

    return call(run_it)


def mount_private(folder: Path, size: int) -> None:
    """Mounts a tmpfs of `size` bytes that only this process and its children see. Raises: OSError."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(code: int) -> None:
        if code:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))

    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()))


def remount(folder: Path, *, size: int | None = None, read_only: bool = False) -> None:
    """Changes size or write protection of a mounted tmpfs. Raises: OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = MS_REMOUNT | (MS_RDONLY if read_only else 0)
    options = f"size={size}".encode() if size is not None else None
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
