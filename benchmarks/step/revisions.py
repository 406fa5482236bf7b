"""Compares whole training steps of two checkouts of fastkd, interleaved in one run.

    git worktree add ../before COMMIT && cp fastkd/_cpu*.so ../before/fastkd/
    python -m benchmarks.step.revisions --before ../before        # half an hour on two idle cores

Each checkout runs the same problems in a separate process; the processes step alternately. Times are minima over the
rounds, memory is the additional peak memory of one step. The table is docs/results/step-revisions.md, with the numbers
beside it as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import KEEP_MEMORY, commit, machine

# Runs in either checkout: the other two imports are the module's names in older checkouts.
WORKER = """
import gc, json, sys, torch
from benchmarks.memory import measure
try:
    from benchmarks.step.candidates import Problem, ours
except ImportError:
    try:
        from benchmarks.step.contenders import Problem, ours
    except ImportError:
        from benchmarks.step_contenders import Problem, ours
torch.set_num_threads(int(sys.argv[1]))
candidate = None
for line in sys.stdin:
    order = json.loads(line)
    if order["do"] == "build":
        candidate = None
        gc.collect()
        candidate = ours(Problem(**order["problem"]), order["method"], order["form"])
        candidate.step()
        answer = None
    elif order["do"] == "time":
        answer = candidate.timed()
    else:
        answer = measure(candidate.step, torch.device("cpu")).peak
    print(json.dumps({"answer": answer}), flush=True)
"""


class Checkout:
    """A process that executes steps with the code of a folder."""

    def __init__(self, folder: Path, threads: int):
        environment = {**KEEP_MEMORY, **os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", WORKER, str(threads)]
        self.folder = folder
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **order: Any) -> Any:
        """Send a command and return its result: None for "build", seconds for "time", bytes for "memory"."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"revisions: the worker in {self.folder} ended with code {self.process.wait()}")
        return json.loads(line)["answer"]


def cases(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The steps to compare, in order of cost."""
    for form in chosen.forms:
        for images in chosen.images:
            for detector in chosen.detectors:
                for method in chosen.methods:
                    sides = {"height": chosen.height, "width": chosen.width, "boxes": chosen.boxes}
                    yield {
                        "problem": {"detector": detector, "images": images, **sides},
                        "method": method,
                        "form": form,
                    }


def compare(before: Checkout, after: Checkout, case: dict[str, Any], turns: int) -> dict[str, Any]:
    """Seconds of every round and peak bytes of both checkouts for one case."""
    sides = {"before": before, "after": after}
    for side in sides.values():
        side.ask("build", **case)
    peaks = {name: side.ask("memory") for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for name in sides if turn % 2 == 0 else reversed(sides):
            seconds[name].append(sides[name].ask("time"))
    return {**case, "seconds": seconds, "peak": peaks}


def page(found: dict[str, Any]) -> str:
    """The table of all cases."""
    lines = [
        "# Whole steps before and after a change",
        "",
        *(f"`{command}`" for command in found["commands"]),
        "",
        f"Commit {found['commits']['before']} against {found['commits']['after']},",
        f"{found['machine']['cpu']}, {found['threads']} threads, torch {found['machine']['torch']}.",
        "Minima over the turns, peak memory of one step beyond what was held before it; in brackets after / before.",
        "The quartiles of the turns' own ratios show what this machine can tell.",
        "",
        "| step | B | image | dtype | turns | before, s | after, s | quartiles | peak before, MiB | peak after, MiB |",
        "|---|---|---|---|---:|---:|---:|---|---:|---:|",
    ]
    for row in found["rows"]:
        fast = {name: min(times) for name, times in row["seconds"].items()}
        ratios = [after / before for before, after in zip(row["seconds"]["before"], row["seconds"]["after"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        size = {name: peak / 2**20 for name, peak in row["peak"].items()}
        lines.append(
            f"| {row['problem']['detector']}, {row['method']} | {row['problem']['images']} "
            f"| {row['problem']['height']} x {row['problem']['width']} | {row['form']} "
            f"| {len(ratios)} | {fast['before']:.3f} | {fast['after']:.3f} ({fast['after'] / fast['before']:.3f}) "
            f"| {low:.3f}, {middle:.3f}, {high:.3f} "
            f"| {size['before']:,.0f} | {size['after']:,.0f} ({size['after'] / size['before']:.3f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(prog="benchmarks.step.revisions", description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout with the older code and its _cpu.so")
    parser.add_argument("--after", type=Path, default=Path.cwd(), help="checkout with the newer code")
    parser.add_argument("--out", type=Path, default=Path("docs/results/step-revisions"), help="without a suffix")
    parser.add_argument("--turns", type=int, default=3, help="steps of each side in each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--detectors", nargs="+", default=["retinanet", "faster-rcnn"])
    parser.add_argument("--methods", nargs="+", default=["lgd", "icd"])
    parser.add_argument("--forms", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--append", action="store_true", help="keep the rows of the file, as of another image size")
    parser.add_argument("--images", nargs="+", type=int, default=[1, 2], help="images of a batch")
    parser.add_argument("--boxes", type=int, default=7, help="boxes of an image")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1216)
    chosen = parser.parse_args()
    sides = [Checkout(folder.resolve(), chosen.threads) for folder in (chosen.before, chosen.after)]
    found = {
        "commands": [f"python -m benchmarks.step.revisions {shlex.join(sys.argv[1:])}"],
        "commits": dict(zip(("before", "after"), (commit(folder) for folder in (chosen.before, chosen.after)))),
        "machine": machine(torch.device("cpu")),
        "threads": chosen.threads,
        "rows": [],
    }
    if chosen.append:
        earlier = json.loads(chosen.out.with_suffix(".json").read_text(encoding="utf-8"))
        if earlier["commits"] != found["commits"]:
            raise SystemExit(f"revisions: {chosen.out} compares {earlier['commits']}, not {found['commits']}")
        found["commands"] = earlier["commands"] + found["commands"]
        found["rows"] = earlier["rows"]
    for case in cases(chosen):
        found["rows"].append(compare(*sides, case, chosen.turns))
        chosen.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        chosen.out.with_suffix(".md").write_text(page(found), encoding="utf-8")
        print(page(found).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
