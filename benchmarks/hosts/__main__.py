"""Effect of distillation in other training frameworks: `python -m benchmarks.hosts` (hours, resumable).

Scenes in each host's data format, the host's training entry point, a larger teacher trained in the host, and three
seeds each of: the host alone, with ICD, with LGD, and with Ultralytics' built-in distillation. Equal numbers of steps;
AP by pycocotools from the host's predictions; seconds per step and memory, also with the reference backend in a short
run. Writes docs/results/hosts.md and .json. Try it at toy size, and with another --out, with --steps 4 --train 32
--val 8 --seeds 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.hosts.runs import HOSTS, METHODS, Clock, Job
from benchmarks.hosts.scenes import average_precision, generate
from fastkd.report.seeds import Mean

REFERENCE_STEPS = 30


def run(host: str, job: Job) -> dict[str, float]:
    """Train and evaluate in this process."""
    from fastkd.ops import use_backend

    torch.manual_seed(job.seed)
    clock = Clock(job.device)
    found = HOSTS[host](job, clock)
    result = {"seconds": clock.median(), "steps": len(clock.ticks), **average_precision(job.data, found)}
    if job.device == "cuda":
        result["mebibytes"] = torch.cuda.max_memory_allocated() / 2**20
    else:
        result["mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if job.distils:
        plain, folder = Clock(job.device), job.folder / "reference"
        folder.mkdir(exist_ok=True)
        short = dataclasses.replace(job, steps=min(job.steps, REFERENCE_STEPS), folder=folder)
        with use_backend("reference"):
            HOSTS[host](short, plain)
        result["reference_seconds"] = plain.median()
    return result


def folder_of(out: Path, host: str, method: str, seed: int) -> Path:
    """Folder of a run."""
    return out / f"{host}-{method}-seed{seed}"


def one(arguments: argparse.Namespace, host: str, method: str, seed: int) -> dict[str, float]:
    """Execute a run in a separate process, unless it is finished."""
    folder = folder_of(arguments.out, host, method, seed)
    if not (folder / "result.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.hosts", "--one", host, method, str(seed), "--out", arguments.out]
        command += ["--steps", arguments.steps, "--train", arguments.train, "--val", arguments.val]
        command += ["--device", arguments.device]
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            code = subprocess.run(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            raise SystemExit(f"hosts: {folder.name} ended with code {code}, see {folder / 'log.txt'}")
        print(folder.name, (folder / "result.json").read_text(), flush=True)
    return json.loads((folder / "result.json").read_text())


def table(results: dict[str, dict[str, list[dict[str, float]]]], teachers: dict[str, dict[str, float]]) -> str:
    """The results as markdown, host by host."""
    lines = []
    for host, methods in results.items():
        lines += [f"\n## {host}\n", f"Teacher: AP {teachers[host]['AP']:.1f}.\n"]
        names = ("run", "AP by seed", "gain over alone, 95 % interval", "s a step", "times", "MiB", "reference")
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        alone = methods["alone"]
        for method, runs in methods.items():
            gains = [run["AP"] - plain["AP"] for run, plain in zip(runs, alone, strict=True)]
            seconds, before = (statistics.fmean(run["seconds"] for run in each) for each in (runs, alone))
            slow = [run["reference_seconds"] for run in runs if "reference_seconds" in run]
            memory = statistics.fmean(run["mebibytes"] for run in runs)
            cells = [method, ", ".join(f"{run['AP']:.1f}" for run in runs)]
            cells.append("" if method == "alone" else Mean(tuple(gains)).signed)
            cells += [f"{seconds:.3f}", f"{seconds / before:.2f}", f"{memory:.0f}"]
            cells.append(f"{statistics.fmean(slow):.3f}" if slow else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Execute missing runs and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=list(HOSTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--val", type=int, default=300, help="validation images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("build/hosts"))
    parser.add_argument("--write", type=Path, help="stem of the .md and .json; default docs/results/hosts")
    parser.add_argument("--one", nargs=3, metavar=("HOST", "METHOD", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data = generate(arguments.out / "scenes", arguments.train, arguments.val)
    if arguments.one:
        host, method, seed = arguments.one[0], arguments.one[1], int(arguments.one[2])
        teacher = None if method == "teacher" else folder_of(arguments.out, host, "teacher", 0) / "model.pt"
        folder = folder_of(arguments.out, host, method, seed)
        result = run(host, Job(data, folder, method, arguments.steps, seed, teacher, arguments.device))
        (folder / "result.json").write_text(json.dumps(result))
        return
    teachers = {host: one(arguments, host, "teacher", 0) for host in arguments.hosts}
    results: dict[str, dict[str, list[dict[str, float]]]] = {host: {} for host in arguments.hosts}
    for seed in arguments.seeds:
        for host in arguments.hosts:
            for method in METHODS[host]:
                results[host].setdefault(method, []).append(one(arguments, host, method, seed))
    stem = arguments.write or Path("docs/results/hosts")
    command = " ".join(["python -m benchmarks.hosts", *sys.argv[1:]])
    head = f"# Distillation inside other training code\n\n`{command}`, torch {torch.__version__}, {arguments.device}.\n"
    stem.with_suffix(".md").write_text(head + table(results, teachers))
    content = {"command": command, "teachers": teachers, "results": results}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
