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

# Runs in either checkout: the other two imports are the module's names in older checkouts, whose methods returned
# (losses, instructive). "own" is the method's forward and backward pass on fixed pyramids.
WORKER = """
import gc, json, sys, time, torch
from fastkd.training.schedule import Phase
from benchmarks.memory import measure
try:
    from benchmarks.step.candidates import Problem, ours
except ImportError:
    try:
        from benchmarks.step.contenders import Problem, ours
    except ImportError:
        from benchmarks.step_contenders import Problem, ours
torch.set_num_threads(int(sys.argv[1]))
candidate = pyramids = None

def autocast():
    dtype = candidate.module.dtype
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)

def own():
    module, batch = candidate.module, candidate.batch
    student = [level.detach().clone().requires_grad_() for level in pyramids[0]]
    begin = time.perf_counter()
    with autocast():
        made = module.distill_by(module.distiller, student, batch, Phase(), lambda: pyramids[1])
    losses, instructive = made if isinstance(made, tuple) else (made.losses, made.instructive)
    results = [*losses.values(), *(instructive or [])]
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    return time.perf_counter() - begin

for line in sys.stdin:
    order = json.loads(line)
    if order["do"] == "build":
        candidate = None
        gc.collect()
        candidate = ours(Problem(**order["problem"]), order["method"], order["form"])
        with autocast(), torch.no_grad():
            teacher = candidate.module.teacher
            pyramids = [
                candidate.module.detector.features(candidate.batch.images),
                teacher and teacher.pyramid(candidate.batch.images),
            ]
        own()
        if order["steps"]:
            candidate.step()
        answer = None
    elif order["do"] == "own":
        answer = own()
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
        """Send a command and return its result: None for "build", seconds for "time" and "own", bytes for "memory"."""
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


def compare(before: Checkout, after: Checkout, case: dict[str, Any], turns: int, own_turns: int) -> dict[str, Any]:
    """Seconds of every round, of steps and of the method alone, and peak bytes of both checkouts for one case."""
    sides = {"before": before, "after": after}
    for side in sides.values():
        side.ask("build", steps=turns > 0, **case)
    found: dict[str, Any] = dict(case)
    if turns:
        found["peak"] = {name: side.ask("memory") for name, side in sides.items()}
    for what, key, rounds in (("time", "seconds", turns), ("own", "own", own_turns)):
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds):
            for name in sides if turn % 2 == 0 else reversed(sides):
                seconds[name].append(sides[name].ask(what))
        if rounds:
            found[key] = seconds
    return found


def key(row: dict[str, Any]) -> str:
    """The name of a case."""
    problem = row["problem"]
    size = f"{problem['images']} | {problem['height']} x {problem['width']}"
    return f"{problem['detector']}, {row['method']} | {size} | {row['form']}"


def ratio(seconds: dict[str, list[float]]) -> str:
    """Turns, minima of both sides with their ratio, and the quartiles of the turns' ratios."""
    low = {name: min(times) for name, times in seconds.items()}
    ratios = [after / before for before, after in zip(seconds["before"], seconds["after"])]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios
    return (
        f"{len(ratios)} | {low['before']:.3f} | {low['after']:.3f} ({low['after'] / low['before']:.3f}) "
        f"| {', '.join(f'{one:.3f}' for one in quartiles)}"
    )


def page(found: dict[str, Any]) -> str:
    """The tables of all cases: whole steps, and the method's own part of them."""
    lines = [
        "# Whole steps before and after a change",
        "",
        *(f"- `{command}`" for command in found["commands"]),
        "",
        f"Commit {found['commits']['before']} against {found['commits']['after']},",
        f"{found['machine']['cpu']}, {found['threads']} threads, torch {found['machine']['torch']}.",
        "",
        "## Steps",
        "",
        "Minima over the turns; peak memory of one step beyond what was held before it; in brackets after / before.",
        "The quartiles of the ratios turn by turn show how much this machine can tell.",
        "",
        "| step | B | image | dtype | turns | before, s | after, s | quartiles | peak before, MiB | peak after, MiB |",
        "|---|---|---|---|---:|---:|---:|---|---:|---:|",
    ]
    rows = [row for row in found["rows"] if "seconds" in row]
    for row in rows:
        size = {name: peak / 2**20 for name, peak in row["peak"].items()}
        memory = f"{size['before']:,.0f} | {size['after']:,.0f} ({size['after'] / size['before']:.3f})"
        lines.append(f"| {key(row)} | {ratio(row['seconds'])} | {memory} |")
    rows = [row for row in rows if "own" in row]
    if rows:
        lines += [
            "",
            "## The method alone",
            "",
            "Forward and backward of the distiller on fixed pyramids. All else in a step is the same code in both",
            "checkouts, so that the difference, as a share of the step, is the change of the step without the noise of",
            "its convolutions.",
            "",
            "| method | B | image | dtype | turns | before, s | after, s | quartiles | of the step |",
            "|---|---|---|---|---:|---:|---:|---|---:|",
        ]
    for row in rows:
        own = {name: min(times) for name, times in row["own"].items()}
        change = (own["after"] - own["before"]) / min(row["seconds"]["before"])
        lines.append(f"| {key(row)} | {ratio(row['own'])} | {change:+.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(prog="benchmarks.step.revisions", description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout with the older code and its _cpu.so")
    parser.add_argument("--after", type=Path, default=Path.cwd(), help="checkout with the newer code")
    parser.add_argument("--out", type=Path, default=Path("docs/results/step-revisions"), help="without a suffix")
    parser.add_argument("--turns", type=int, default=3, help="steps of each side in each case; 0: none")
    parser.add_argument("--own-turns", type=int, default=20, help="turns of the method alone in each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--detectors", nargs="+", default=["retinanet", "faster-rcnn"])
    parser.add_argument("--methods", nargs="+", default=["lgd", "icd"])
    parser.add_argument("--forms", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--append", action="store_true", help="add to the rows of the file")
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
    rows = {key(row): row for row in found["rows"]}
    for case in cases(chosen):
        rows[key(case)] = rows.get(key(case), {}) | compare(*sides, case, chosen.turns, chosen.own_turns)
        found["rows"] = list(rows.values())
        chosen.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        chosen.out.with_suffix(".md").write_text(page(found), encoding="utf-8")
        print(key(case), flush=True)


if __name__ == "__main__":
    main()
