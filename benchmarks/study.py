"""Does distillation teach? `python -m benchmarks.study`, or `make study` (about two hours on two cores, resumable).

Trains every row below with every seed, each as a process of its own, and writes docs/results/scenes.md, .json and
.png: AP as mean, spread and per seed, gains seed by seed, cost, command and commit. Rows of one detector and seed
differ in the method alone: same data, steps, batch order, initial backbone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe, and the row its gain is measured against."""

    recipe: str
    label: str
    control: str | None


ROWS = (
    Row("scenes-retinanet-baseline", "RetinaNet baseline", None),
    Row("scenes-retinanet-lgd", "RetinaNet + LGD", "scenes-retinanet-baseline"),
    Row("scenes-retinanet-fgfi", "RetinaNet + FGFI", "scenes-retinanet-baseline"),
    Row("scenes-retinanet-inherit", "RetinaNet inheriting (control of ICD)", "scenes-retinanet-baseline"),
    Row("scenes-retinanet-icd", "RetinaNet + ICD (inheriting)", "scenes-retinanet-inherit"),
    Row("scenes-faster-rcnn-baseline", "Faster R-CNN baseline", None),
    Row("scenes-faster-rcnn-lgd", "Faster R-CNN + LGD", "scenes-faster-rcnn-baseline"),
    Row("scenes-faster-rcnn-inherit", "Faster R-CNN inheriting (control of ICD)", "scenes-faster-rcnn-baseline"),
    Row("scenes-faster-rcnn-icd", "Faster R-CNN + ICD (inheriting)", "scenes-faster-rcnn-inherit"),
)
# glibc returns large blocks to the system and faults them in again, a tenth of a step's time at these sizes
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "67108864",
}
TEACHERS = ("scenes-retinanet-teacher", "scenes-faster-rcnn-teacher")


def run_directory(out: Path, recipe: str, seed: int) -> Path:
    """Where a run of the study is."""
    return out / f"{recipe}-seed{seed}"


def train(out: Path, recipe: str, seed: int, threads: int, overrides: list[str]) -> None:
    """Train one run unless it is finished; its output goes to a file beside it."""
    run_dir = run_directory(out, recipe, seed)
    if (run_dir / "metrics.json").is_file():
        return
    command = [sys.executable, "-m", "fastkd.cli", "train", recipe, "--run-dir", str(run_dir), "--resume"]
    command += ["--seed", str(seed), *overrides]
    begin = time.monotonic()
    with open(out / f"{run_dir.name}.log", "a", encoding="utf-8") as log:
        environment = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise SystemExit(
            f"study: {run_dir.name} ended with code {code}, see {out / run_dir.name}.log; run again to resume"
        )
    ap = json.loads((run_dir / "metrics.json").read_text())["bbox"]["AP"]
    print(f"{run_dir.name}: AP {ap:.1f} in {time.monotonic() - begin:.0f} s", flush=True)


def read(out: Path, seeds: list[int]) -> dict[str, dict[int, dict]]:
    """Metrics and ledger of every finished run: recipe -> seed -> {"AP", "AP50", "ledger", ...}."""
    found: dict[str, dict[int, dict]] = {}
    for row in ROWS:
        for seed in seeds:
            run_dir = run_directory(out, row.recipe, seed)
            if not (run_dir / "metrics.json").is_file():
                continue
            metrics = json.loads((run_dir / "metrics.json").read_text())
            ledger = json.loads((run_dir / "ledger.json").read_text())
            found.setdefault(row.recipe, {})[seed] = {
                **{key: metrics["bbox"][key] for key in ("AP", "AP50", "AP75")},
                **{key: metrics[key] for key in ("steps", "batch_size", "seconds", "commit", "torch")},
                "command": f"fastkd train {row.recipe} --seed {seed}",
                "student_step": ledger["student"]["seconds_per_step"],
                "method_step": ledger["with_method"]["seconds_per_step"],
                "extra_bytes": ledger["extra"]["peak_bytes"],
                "with_teacher": ledger["extra_with_teacher"]["seconds_per_step"],
            }
    return found


def gains(found: dict[str, dict[int, dict]], row: Row) -> dict[int, float]:
    """AP over the control's, seed by seed."""
    control = found.get(row.control, {})
    return {seed: run["AP"] - control[seed]["AP"] for seed, run in found[row.recipe].items() if seed in control}


def _spread(values: list[float]) -> str:
    return f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"


def _cost(runs: list[dict]) -> list[str]:
    """Time of a step against the student's alone (median of the runs' own ratios), memory, time with the teacher's."""
    ratio = statistics.median(run["method_step"] / run["student_step"] for run in runs)
    memory = statistics.median(run["extra_bytes"] for run in runs) / 2**20
    whole = [run["with_teacher"] / run["student_step"] for run in runs if run["with_teacher"] is not None]
    return [f"{ratio:.2f} x", f"{memory:+.0f} MiB", f"{statistics.median(whole):+.0%}" if whole else "unknown"]


def table(found: dict[str, dict[int, dict]], seeds: list[int]) -> list[str]:
    """The Markdown table of AP, gains and cost."""
    heads = [
        "student",
        "steps",
        *(f"seed {seed}" for seed in seeds),
        "mean AP",
        "s.d.",
        "gain over",
        "gain by seed",
        "mean gain",
    ]
    heads += ["step", "memory", "extra time with teacher's training"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    labels = {row.recipe: row.label for row in ROWS}
    for row in ROWS:
        runs = found.get(row.recipe)
        if not runs:
            continue
        values = [runs[seed]["AP"] for seed in seeds if seed in runs]
        gained = gains(found, row) if row.control else {}
        steps = str(next(iter(runs.values()))["steps"])
        cells = [row.label, steps, *(f"{runs[seed]['AP']:.1f}" if seed in runs else "-" for seed in seeds)]
        cells += [f"**{statistics.mean(values):.1f}**", _spread(values)]
        cells += [labels[row.control].split(" (")[0] if gained else "-"]
        cells += [", ".join(f"{gain:+.1f}" for gain in gained.values()) or "-"]
        cells += [f"**{statistics.mean(gained.values()):+.1f}**" if gained else "-", *_cost(list(runs.values()))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def teacher_lines() -> list[str]:
    """What the shipped teachers reach, from the JSON beside their weights."""
    from fastkd.assets import FOLDER

    lines = []
    for name in TEACHERS:
        facts = json.loads((FOLDER / f"{name}.json").read_text())
        lines.append(
            f"- {name}: AP {facts['AP']:.1f} after {facts['steps']} steps ({facts['seconds'] / 60:.0f} min), "
            f"{facts['parameters'] / 1e6:.1f} M parameters, commit {(facts['commit'] or 'unknown')[:12]}"
        )
    return lines


def plot(found: dict[str, dict[int, dict]], path: Path) -> None:
    """AP of every run as points, means as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in ROWS if row.recipe in found]
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        values = [run["AP"] for run in found[row.recipe].values()]
        colour = {"baseline": "#9aa5b1", "inherit": "#9aa5b1", "lgd": "#3b7dd8", "icd": "#d8743b", "fgfi": "#59a14f"}[
            row.recipe.rsplit("-", 1)[1]
        ]
        axis.barh(place, statistics.mean(values), color=colour, alpha=0.55)
        axis.plot(values, [place] * len(values), "o", color="#222222", markersize=4)
        label = f"{statistics.mean(values):.1f}"
        axis.annotate(label, (max(values), place), xytext=(8, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("box AP on Scenes (bar: mean, dots: seeds)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _short(commit: str | None) -> str:
    """A commit's first digits, with "+" where the tree differed from it."""
    return (commit or "unknown")[:12] + ("+" if (commit or "").endswith("+") else "")


def write_results(out: Path, seeds: list[int], target: Path, arguments: str) -> None:
    """scenes.md, scenes.json and scenes.png from whatever runs are finished."""
    found = read(out, seeds)
    if not found:
        raise SystemExit(f"study: {out} must hold finished runs, got none")
    runs = [run for by_seed in found.values() for run in by_seed.values()]
    commits = sorted({_short(run["commit"]) for run in runs})
    wanted = len(seeds) * len(ROWS)
    lines = [
        "# Scenes: does distillation teach?",
        "",
        f"Command: `python -m benchmarks.study{arguments}` ({len(runs)} of {wanted} runs finished). Runs by commit "
        f"{', '.join(commits)}, torch {runs[0]['torch']}, {runs[0]['batch_size']} images a step, 8,000 training and "
        "500 validation images (`fastkd data scenes`, seed 0), box AP by pycocotools.",
        "",
        *table(found, seeds),
        "",
        "Gains compare runs of the same seed. `step` is the time of a training step against the student's alone,",
        "`memory` the extra peak, both measured in the run itself, turn and turn about (the cost ledger); the last",
        "column adds the training of the teacher, spread over the run's steps, in per cent of the student's step.",
        "",
        "![AP of every run](scenes.png)",
        "",
        "Teachers (made by `python -m benchmarks.assets`):",
        "",
        *teacher_lines(),
        "",
        "One run alone: `fastkd train scenes-retinanet-lgd --seed 1`.",
        "",
    ]
    target.mkdir(parents=True, exist_ok=True)
    (target / "scenes.md").write_text("\n".join(lines), encoding="utf-8")
    (target / "scenes.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, target / "scenes.png")
    print("\n".join(lines))


def main() -> None:
    """Train what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every row (default: 0 1 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the table")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, help="steps of every run, instead of the recipes'")
    parser.add_argument(
        "--rows", nargs="+", choices=[row.recipe for row in ROWS], help="only these rows, in this order"
    )
    parser.add_argument("--only-write", action="store_true", help="train nothing, write the results of finished runs")
    chosen = parser.parse_args()
    overrides = ["--schedule.steps", str(chosen.steps)] if chosen.steps else []
    chosen.out.mkdir(parents=True, exist_ok=True)
    if not chosen.only_write:
        data = [sys.executable, "-m", "fastkd.cli", "data", "scenes", "--train", "8000", "--val", "500"]
        subprocess.run(data, check=True)
        recipes = chosen.rows or [row.recipe for row in ROWS]
        with ThreadPoolExecutor(chosen.jobs) as pool:
            runs = [
                pool.submit(train, chosen.out, recipe, seed, 1, overrides)
                for seed in chosen.seeds
                for recipe in recipes
            ]
            for run in runs:
                run.result()
    arguments = "".join(f" --{name} {value}" for name, value in (("steps", chosen.steps),) if value)
    write_results(chosen.out, chosen.seeds, chosen.results, arguments)


if __name__ == "__main__":
    main()
