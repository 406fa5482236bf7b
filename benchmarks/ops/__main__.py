"""Time and memory of the ops: `python -m benchmarks.ops`, or `make bench` (ten minutes on two idle cores).

Measures every op against plain torch and torch.compile of it in one run, together with the peak rates of the machine,
and writes docs/results/ops.json, ops.md and plots. pytest-benchmark is the timer; every call is checked against plain
torch before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import KEEP_MEMORY, commit, machine
from benchmarks.gpu import roofline
from benchmarks.ops import results
from benchmarks.ops.draws import QUICK, Draw, Shape
from benchmarks.ops.limits import CPU_ONLY, LIMITS, arithmetic_limit
from benchmarks.ops.rows import BY_NAME, ROWS, Row
from fastkd.files import write_json

GROWTH: dict[str, list[dict[str, int]]] = {
    "images": [{"images": images} for images in (1, 2, 4)],
    "cells": [{"height": height} for height in (200, 400, 800, 1600)],
    "boxes": [{"boxes": boxes} for boxes in (5, 10, 20, 40, 80)],
    "queries": [{"queries": queries} for queries in (10, 20, 40, 80, 160, 320)],
}
QUICK_GROWTH: dict[str, list[dict[str, int]]] = {
    "images": [{"images": 1}, {"images": 2}],
    "cells": [{"height": 96}, {"height": 192}],
    "boxes": [{"boxes": 2}, {"boxes": 4}],
    "queries": [{"queries": 4}, {"queries": 8}],
}
LOG = Path("build/ops.log")


def point(row: Row, shape: Shape, kind: str, threads: int, **changes: Any) -> dict[str, Any]:
    """Settings of one measurement for benchmarks/ops/timings.py."""
    found = {
        "row": row.name,
        "kind": kind,
        "side": "ours",
        "dtype": "float32",
        "channels_last": False,
        "threads": threads,
        "shape": dataclasses.asdict(shape),
        **changes,
    }
    return {**found, "id": "-".join(str(part) for part in (row.name, kind, *changes.values()))}


def plan(rows: list[Row], parts: set[str], quick: bool, threads: int, device: str) -> list[dict[str, Any]]:
    """The measurements of these rows. Args: parts: subset of main, compiled, variants, growth."""
    base, points = QUICK if quick else Shape(), []
    for row in rows:
        shape = base if quick else row.shape(base)
        case = row.build(Draw(QUICK, torch.float32, False, torch.device("cpu")))
        sides = ["ours", *(f"plain: {name}" for name in case.plain), *(["compiled"] if "compiled" in parts else [])]
        if case.passes and device == "cpu":
            sides.append("floor")
        points += [point(row, shape, "main", threads, side=side) for side in sides]
        if "variants" in parts:
            points += [
                point(row, shape, "variant", threads, variant="channels-last", channels_last=True),
                point(row, shape, "variant", threads, variant="bfloat16", dtype="bfloat16"),
                point(row, shape, "variant", 1, variant="one thread"),
            ]
        for axis in row.growth if "growth" in parts else ():
            for step in (QUICK_GROWTH if quick else GROWTH)[axis]:
                grown = dataclasses.replace(shape, **step)
                x = grown.cells if axis == "cells" else getattr(grown, axis)
                points.append(point(row, grown, "growth", threads, axis=axis, x=x))
    return points


def measure(settings: dict[str, Any]) -> tuple[list[dict], bool]:
    """Run the points in a separate process whose allocator keeps its memory (environment variables override this).

    Its output is written to LOG.

    Returns: pytest-benchmark's list, and whether every check passed.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan_file, timings = Path(folder) / "plan.json", Path(folder) / "timings.json"
        plan_file.write_text(json.dumps(settings), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-o", "addopts="]
        command += ["--benchmark-disable-gc", f"--benchmark-json={timings}", "--benchmark-columns=min,median,rounds"]
        command.append(str(Path(__file__).with_name("timings.py")))
        environment = {**KEEP_MEMORY, **os.environ, "FASTKD_BENCH_PLAN": str(plan_file)}
        for name in [name for name in environment if name.startswith("PYTEST_XDIST")]:
            del environment[name]  # pytest-benchmark is disabled in xdist workers
        LOG.parent.mkdir(exist_ok=True)
        with open(LOG, "w", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if code not in (0, 1) or not timings.is_file():
            raise SystemExit(f"ops: the measurements ended with code {code}, see {LOG}")
        return json.loads(timings.read_text(encoding="utf-8"))["benchmarks"], code == 0


def collect(chosen: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Measure the chosen rows."""
    device = torch.device(chosen.device)
    rows = [BY_NAME[name] for name in chosen.rows] if chosen.rows else list(ROWS)
    base = QUICK if chosen.quick else Shape()
    settings = {
        "device": chosen.device,
        "seed": chosen.seed,
        "threads": chosen.threads,
        "quick": chosen.quick,
        "seconds": 0.0 if chosen.quick else chosen.seconds,
        "rounds": 1 if chosen.quick else 5,
        "backend": "aot_eager" if chosen.quick else "inductor",  # avoids half a minute of C++ compilation
        "limits": [name for name in LIMITS if device.type == "cpu" or name not in CPU_ONLY],
        "points": plan(rows, set(chosen.parts), chosen.quick, chosen.threads, device.type),
    }
    timings, green = measure(settings)
    found = results.gather(timings, arithmetic_limit(device))
    arguments = shlex.join(sys.argv[1:])
    return {
        "command": f"python -m benchmarks.ops {arguments}".strip(),
        "commit": commit(),
        "seed": chosen.seed,
        "threads": chosen.threads,
        "base_shape": dataclasses.asdict(base),
        "cells": base.cells,
        "machine": machine(device),
        **found,
    }, green


def write(saved: dict[str, Any], out: Path) -> None:
    """ops.json, ops.md and the plots."""
    from benchmarks.ops import plots

    write_json(out / "ops.json", saved)
    plots.times(saved["rows"], out / "ops-times.png")
    if saved["growth"]:
        plots.growth(saved["growth"], out / "ops-growth.png")
    (out / "ops.md").write_text(results.report(saved), encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=list(BY_NAME), help=f"of {', '.join(BY_NAME)}")
    parts = ["compiled", "variants", "growth"]
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts, help="beside ours and plain (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round: does everything run?")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--seconds", type=float, default=0.5, help="about this long for each timing (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs (default: 0)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: docs/results; of parts build/bench)")
    parser.add_argument("--compare", type=Path, metavar="JSON", help="print times relative to a saved run")
    parser.add_argument("--threshold", type=float, default=1.1, help="largest ratio to a saved run that passes (1.1)")
    parser.add_argument("--quote", type=Path, metavar="JSON", help="print a saved run's lines for the README, no run")
    chosen = parser.parse_args(arguments)
    whole = not chosen.rows and not chosen.quick and chosen.parts == parts
    chosen.out = chosen.out or Path("docs/results" if whole else "build/bench")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, compare; 1 if a check failed or a row is slower than allowed."""
    chosen = parse(arguments)
    if chosen.quote:
        print(results.quote(json.loads(chosen.quote.read_text(encoding="utf-8"))))
        return 0
    before = json.loads(chosen.compare.read_text(encoding="utf-8")) if chosen.compare else None
    chosen.out.mkdir(parents=True, exist_ok=True)
    saved, green = collect(chosen)
    if before is None:
        write(saved, chosen.out)
        print(results.report(saved))
        if saved["machine"]["device"] != "cpu":
            print("\n".join(roofline.achieved(saved["rows"], saved["machine"]["device"])))
    else:
        lines, passed = results.compare(before, saved, chosen.threshold)
        print("\n".join(lines))
        green &= passed
    if not green:
        print(f"ops: a check failed or a row is slower than allowed, see above and {LOG}")
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
