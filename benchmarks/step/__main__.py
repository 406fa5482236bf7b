"""Cost of a training step: `python -m benchmarks.step`, or `make bench-step` (35 minutes on two idle cores).

Whole steps (forward, backward, update) on 800 x 1216 images: the student alone, LGD and ICD, in plain torch and ours,
in float32 and in bfloat16 under autocast with channels-last; on the first problem also --runtime.recompute and
--runtime.compile, FGFI and the training of a teacher for the cost ledger. The candidates are interleaved in one
process; times are minima. The first round of a problem also counts operators, bytes, products and allocations. The
machine's rates of convolutions and products are measured first. Writes docs/results/step.json, step.md and step.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import KEEP_MEMORY, commit, machine
from benchmarks.step import own as step_own
from benchmarks.step import rates as step_rates
from benchmarks.step import results as step_results
from benchmarks.step.candidates import FORMS, OPTIONS, Problem
from benchmarks.step.measure import CPU, measure_apart
from fastkd.files import write_json


def problems(chosen: argparse.Namespace) -> list[Problem]:
    """The problems by importance, as time may run out: few boxes before many, one image before two."""
    return [
        Problem(detector, images, boxes, chosen.height, chosen.width)
        for boxes in chosen.boxes
        for images in chosen.images
        for detector in chosen.detectors
    ]


def together(kept: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge a saved run with new measurements; a problem measured again replaces its row."""

    def problem(row: dict[str, Any]) -> tuple:
        return tuple(row[field.name] for field in dataclasses.fields(Problem))

    again = {problem(row) for row in new["rows"]}
    rows = [row for row in kept["rows"] if problem(row) not in again] + new["rows"]
    rows.sort(key=lambda row: (row["boxes"], row["images"], row["detector"] != "retinanet"))  # the order of `problems`
    done = {problem(row) for row in rows}
    skipped = {problem(row): row for run in (kept, new) for row in run["skipped"] if problem(row) not in done}
    commits = dict.fromkeys(commit for run in (kept, new) for commit in run["commit"].split(" and "))
    return {
        **new,
        "command": "` and `".join(run["command"] for run in (kept, new)),
        "commit": " and ".join(commits),
        "seconds": kept["seconds"] + new["seconds"],
        "icd_alone": kept["icd_alone"] or new["icd_alone"],
        "rows": rows,
        "skipped": list(skipped.values()),
    }


def collect(
    chosen: argparse.Namespace, kept: dict[str, Any] | None, write: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Measure the chosen problems within the time limit.

    Args:
        kept: a run with the first problems already done.
        write: called with all that was found after every problem, so that an end of this process loses one.
    """
    torch.set_num_threads(chosen.threads)
    begin = time.monotonic()
    saved: dict[str, Any] = {
        "command": f"python -m benchmarks.step {shlex.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "machine": machine(CPU),
        "threads": chosen.threads,
        "rates": kept.get("rates") if kept else step_rates.measure(),
        "icd_alone": None,
        "rows": [],
        "skipped": [],
        "seconds": 0.0,
    }
    seen = {row["detector"] for row in kept["rows"]} if kept else set()
    if step_own.METHOD in chosen.methods and not kept:
        largest = dataclasses.replace(problems(chosen)[0], images=max(chosen.images))
        saved["icd_alone"] = step_own.measure(largest, chosen.forms, chosen.repetitions + 1)
        print(step_results.own_table(saved["icd_alone"]), flush=True)
    for problem in problems(chosen):
        if time.monotonic() - begin > 60 * chosen.minutes:
            saved["skipped"].append(dataclasses.asdict(problem))
            continue
        first = problem.detector not in seen
        counted = problem.boxes == chosen.boxes[0]
        try:
            row = measure_apart(problem, chosen, first=first, counted=counted, tried=not seen, threads=chosen.threads)
        except BrokenProcessPool:
            print(f"step: {problem} was ended from outside, perhaps for want of memory; not measured", flush=True)
            saved["skipped"].append(dataclasses.asdict(problem))
            continue
        saved["rows"].append(row)
        saved["seconds"] = time.monotonic() - begin
        seen.add(problem.detector)
        print(step_results.row_table(row), flush=True)
        write(saved)
    return saved


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", choices=["retinanet", "faster-rcnn"])
    methods = ["student", "lgd", "icd", "fgfi", "teacher"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="default: all")
    forms = [*FORMS, *OPTIONS]
    parser.add_argument("--forms", nargs="+", choices=forms, default=forms, help="default: all")
    parser.add_argument("--images", nargs="+", type=int, help="of a batch (default: 1 2)")
    parser.add_argument("--boxes", nargs="+", type=int, help="of an image (default: 7 30)")
    parser.add_argument("--height", type=int, default=800, help="of the images, pixels (default: 800)")
    parser.add_argument("--width", type=int, default=1216, help="of the images, pixels (default: 1216)")
    parser.add_argument("--repetitions", type=int, default=2, help="timed turns of a detector's first problem (2)")
    parser.add_argument("--minutes", type=float, default=20, help="no new problem begins after so many (default: 20)")
    parser.add_argument("--quick", action="store_true", help="RetinaNet, one image, 7 boxes (eight minutes)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: docs/results; of parts build/bench)")
    parser.add_argument("--report", type=Path, metavar="JSON", help="write the report of a saved run again, no run")
    parser.add_argument("--add-to", type=Path, metavar="JSON", help="a saved run that this one's problems join")
    parser.add_argument("--quote", type=Path, metavar="JSON", help="print a saved run's lines for the README, no run")
    chosen = parser.parse_args(arguments)
    whole = not (chosen.quick or chosen.detectors or chosen.images or chosen.boxes)
    whole = whole and chosen.methods == methods and chosen.forms == forms
    chosen.out = chosen.out or Path("docs/results" if whole else "build/bench")
    chosen.detectors = chosen.detectors or (["retinanet"] if chosen.quick else ["retinanet", "faster-rcnn"])
    chosen.images = chosen.images or ([1] if chosen.quick else [1, 2])
    chosen.boxes = chosen.boxes or ([7] if chosen.quick else [7, 30])
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results; return 0."""
    chosen = parse(arguments)
    if chosen.quote:
        print(step_results.quote(json.loads(chosen.quote.read_text(encoding="utf-8"))))
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    kept = json.loads(chosen.add_to.read_text(encoding="utf-8")) if chosen.add_to else None

    def write(found: dict[str, Any]) -> dict[str, Any]:
        saved = together(kept, found) if kept else found
        write_json(chosen.out / "step.json", saved)
        (chosen.out / "step.md").write_text(step_results.report(saved), encoding="utf-8")
        step_results.plot(saved, chosen.out / "step.png")
        return saved

    if chosen.report:
        saved = write(json.loads(chosen.report.read_text(encoding="utf-8")))
    else:
        saved = write(collect(chosen, kept, write))
    print(step_results.report(saved))
    return 0


if __name__ == "__main__":
    if any(name not in os.environ for name in KEEP_MEMORY):  # read by the allocator at process start
        environment = {**KEEP_MEMORY, **os.environ}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.step", *sys.argv[1:]], environment)
    sys.exit(main())
