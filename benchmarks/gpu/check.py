"""Builds, tests and benchmarks on a GPU in a few minutes: `make gpu-check PYTHON=python3 VENV=none OUT=folder`.

Runs the stages of benchmarks/gpu/stages in order of importance, each in a separate process with a time limit.
OUT/gpu.json is rewritten after each stage; if a stage fails or times out, its records and log are kept and the next one
starts. Needs no network and no virtual environment.
`python -m benchmarks.gpu.results OUT/gpu.json` turns the file into docs/results/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOG_TAIL = 3000  # characters of a failed stage's log that go into the JSON


@dataclass(frozen=True)
class Stage:
    """A process that writes a JSON file.

    Args:
        name: of the stage.
        command: the process; FASTKD_STAGE_FILE names its JSON file, FASTKD_STAGE_SECONDS its time limit.
        limit: seconds after which the process and its children are killed.
    """

    name: str
    command: tuple[str, ...]
    limit: float


LIMITS = {
    "versions": 30,
    "build": 150,
    "windows": 60,
    "tests": 110,
    "sanitizer": 60,
    "ops": 110,
    "parts": 60,
    "steps": 90,
    "scenes": 240,
}


def stages(device: str, toy: bool) -> list[Stage]:
    """The stages in order."""
    options = ("--device", device, *(("--toy",) if toy else ()))
    module = (sys.executable, "-m", "benchmarks.gpu.stages")
    scale = 4 if toy else 1  # a rehearsal may run on a shared machine
    return [Stage(name, (*module, name, *options), scale * limit) for name, limit in LIMITS.items()]


def _kill(process: subprocess.Popen) -> None:
    """Kill a stage with all its children, its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_for(stage: Stage, limit: float, environment: dict[str, str], log: Path) -> tuple[str, int | None]:
    """Status and exit code of a stage whose output goes to a file."""
    with open(log, "w", encoding="utf-8") as output:
        try:
            process = subprocess.Popen(
                stage.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
        except OSError as error:
            output.write(str(error))
            return "failed", None
        try:
            status = "ok" if process.wait(timeout=limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            _kill(process)
    return status, process.returncode


def run_stage(stage: Stage, out: Path, seconds: float) -> dict[str, Any]:
    """{"status": "ok", "failed" or "timeout", "seconds", "limit", "result"}, and "log" if the status is not ok.

    Args:
        seconds: a second limit, beside that of the stage.
    """
    limit, file, log = min(stage.limit, seconds), out / f"{stage.name}.json", out / f"{stage.name}.log"
    file.unlink(missing_ok=True)
    environment = {
        "PYTHONUNBUFFERED": "1",
        **os.environ,
        "FASTKD_STAGE_FILE": str(file),
        "FASTKD_STAGE_SECONDS": f"{limit:.1f}",
    }
    begin = time.monotonic()
    status, code = _wait_for(stage, limit, environment, log)
    entry: dict[str, Any] = {"status": status, "seconds": time.monotonic() - begin, "limit": limit}
    entry["result"] = _read(file)
    if status != "ok":
        entry["code"] = code
        entry["log"] = log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]
    return entry


def _read(file: Path) -> Any:
    """The records of a stage; None if it wrote no valid JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def run(chosen: Sequence[Stage], out: Path, minutes: float, **about: Any) -> dict[str, Any]:
    """Run the stages and write OUT/gpu.json after each; stages without remaining time are "skipped"."""
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    found: dict[str, Any] = {**about, "minutes": minutes, "stages": {}}
    for stage in chosen:
        left = 60 * minutes - (time.monotonic() - begin)
        if left < 1:
            entry = {"status": "skipped", "seconds": 0.0, "limit": 0.0, "result": None}
        else:
            print(f"{stage.name}: at most {min(stage.limit, left):.0f} s", flush=True)
            entry = run_stage(stage, out, left)
        found["stages"][stage.name] = entry
        found["seconds"] = time.monotonic() - begin
        partial = out / "gpu.json.partial"
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        partial.replace(out / "gpu.json")
        print(f"{stage.name}: {entry['status']}, {entry['seconds']:.0f} s", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """0 if all stages are ok, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), help="folder (default: build/gpu-check)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal at toy sizes")
    parser.add_argument("--minutes", type=float, help="in all (default: 8, for a rehearsal 40)")
    parser.add_argument("--stages", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="default: all")
    given = parser.parse_args(arguments)
    toy = given.device == "cpu"
    chosen = [stage for stage in stages(given.device, toy) if stage.name in given.stages]
    minutes = given.minutes or (40 if toy else 8)
    found = run(chosen, given.out.resolve(), minutes, device=given.device, toy=toy)
    return int(any(entry["status"] != "ok" for entry in found["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
