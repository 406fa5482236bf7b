"""Gains of distillation: `python -m benchmarks.study`, or `make study` (about two hours on two cores, resumable).

Trains every row of a study (benchmarks/study/rows.py) with every seed, each in a separate process, and writes
docs/results/<study>.md, .json and .png: AP as mean, spread and per seed, gains seed by seed, cost, command and commit.
Rows of one detector and seed differ only in the method: same data, steps, batch order, initial backbone.
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
from pathlib import Path

from benchmarks.environment import KEEP_MEMORY
from benchmarks.study.rows import METRICS, STUDIES, Row, Study, arguments_of
from fastkd.files import write_json
from fastkd.training.recipes.named import METHODS
from fastkd.training.recipes.pairs import PAIRS

PLAIN_COLOUR = "#9aa5b1"  # students without a method
COLOURS = ("#3b7dd8", "#d8743b", "#59a14f", "#c44e52", "#937860", "#17a2b8", "#8a5fb0")  # methods, in order
TEACHERS = ("scenes-retinanet-teacher", "scenes-faster-rcnn-teacher")


def run_directory(out: Path, run: str, seed: int) -> Path:
    """Folder of a run of the study."""
    return out / f"{run.replace('@', '-')}-seed{seed}"


def train(out: Path, name: str, seed: int, threads: int, overrides: list[str]) -> None:
    """Train one run unless it is finished; its output is written to a file beside it."""
    run_dir = run_directory(out, name, seed)
    if (run_dir / "metrics.json").is_file():
        return
    command = [sys.executable, "-m", "fastkd.cli", "train", *arguments_of(name), "--run-dir", str(run_dir), "--resume"]
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


def read(study: Study, out: Path, seeds: list[int]) -> dict[str, dict[int, dict]]:
    """Metrics and ledger of every finished run: its name -> seed -> {"AP", "AP50", "student_step", ...}."""
    found: dict[str, dict[int, dict]] = {}
    for name in study.runs:
        for seed in seeds:
            run_dir = run_directory(out, name, seed)
            if not (run_dir / "metrics.json").is_file():
                continue
            metrics = json.loads((run_dir / "metrics.json").read_text())
            ledger = json.loads((run_dir / "ledger.json").read_text())
            found.setdefault(name, {})[seed] = {
                **{key: metrics[kind][at] for key, (kind, at) in METRICS.items() if at in metrics.get(kind, {})},
                **{key: metrics[key] for key in ("steps", "batch_size", "seconds", "commit", "torch")},
                "command": f"fastkd train {' '.join(arguments_of(name))} --seed {seed}",
                "student_step": ledger["student"]["seconds_per_step"],
                "method_step": ledger["with_method"]["seconds_per_step"],
                "extra_bytes": ledger["extra"]["peak_bytes"],
                "with_teacher": ledger["extra_with_teacher"]["seconds_per_step"],
            }
    return found


def add_recorded(found: dict[str, dict[int, dict]], study: Study, seeds: list[int], path: Path) -> int:
    """Add runs missing in `found` from a results file; they keep their commit.

    Returns: the number of added runs.
    """
    added = 0
    for name, runs in json.loads(path.read_text(encoding="utf-8")).items():
        for seed, run in runs.items():
            if name in study.runs and int(seed) in seeds and int(seed) not in found.get(name, {}):
                found.setdefault(name, {})[int(seed)] = run
                added += 1
    for name, runs in found.items():
        found[name] = dict(sorted(runs.items()))
    return added


def gains(found: dict[str, dict[int, dict]], row: Row) -> dict[int, float]:
    """Gain in the row's metric over the control, per seed."""
    control, metric = found.get(row.control, {}), row.metric
    return {seed: run[metric] - control[seed][metric] for seed, run in found[row.run].items() if seed in control}


def _spread(values: list[float]) -> str:
    return f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"


def _cost(runs: list[dict]) -> list[str]:
    """Step time relative to the student alone (median over runs), memory, time including the teacher's training."""
    ratio = statistics.median(run["method_step"] / run["student_step"] for run in runs)
    memory = statistics.median(run["extra_bytes"] for run in runs) / 2**20
    whole = [run["with_teacher"] / run["student_step"] for run in runs if run["with_teacher"] is not None]
    return [f"{ratio:.2f} x", f"{memory:+.0f} MiB", f"{statistics.median(whole):+.0%}" if whole else "unknown"]


def table(study: Study, found: dict[str, dict[int, dict]], seeds: list[int]) -> list[str]:
    """The Markdown table of AP, gains and cost."""
    heads = [
        "student",
        "steps",
        *(f"seed {seed}" for seed in seeds),
        "mean",
        "s.d.",
        "gain over",
        "gain by seed",
        "mean gain",
    ]
    heads += ["step", "memory", "extra time with teacher's training"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    labels = {(row.run, row.metric): row.label for row in study.rows}
    for row in study.rows:
        runs = found.get(row.run)
        if not runs:
            continue
        values = [runs[seed][row.metric] for seed in seeds if seed in runs]
        gained = gains(found, row) if row.control else {}
        steps = str(next(iter(runs.values()))["steps"])
        cells = [row.label, steps, *(f"{runs[seed][row.metric]:.1f}" if seed in runs else "-" for seed in seeds)]
        cells += [f"**{statistics.mean(values):.1f}**", _spread(values)]
        cells += [labels[row.control, row.metric].split(" (")[0] if gained else "-"]
        cells += [", ".join(f"{gain:+.1f}" for gain in gained.values()) or "-"]
        cells += [f"**{statistics.mean(gained.values()):+.1f}**" if gained else "-", *_cost(list(runs.values()))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def teacher_lines() -> list[str]:
    """AP of the shipped teachers, from the JSON beside their weights."""
    from fastkd.assets import FOLDER

    lines = []
    for name in TEACHERS:
        facts = json.loads((FOLDER / f"{name}.json").read_text())
        lines.append(
            f"- {name}: AP {facts['AP']:.1f} after {facts['steps']} steps ({facts['seconds'] / 60:.0f} min), "
            f"{facts['parameters'] / 1e6:.1f} M parameters, commit {(facts['commit'] or 'unknown')[:12]}"
        )
    return lines


def plot(study: Study, found: dict[str, dict[int, dict]], path: Path) -> None:
    """Plot AP of every run as points, means as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in study.rows if row.run in found]
    coloured = [*METHODS, *PAIRS]
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        values = [run[row.metric] for run in found[row.run].values()]
        method = arguments_of(row.run)[0].rsplit("-", 1)[1]
        colour = COLOURS[coloured.index(method) % len(COLOURS)] if method in coloured else PLAIN_COLOUR
        axis.barh(place, statistics.mean(values), color=colour, alpha=0.55)
        axis.plot(values, [place] * len(values), "o", color="#222222", markersize=4)
        label = f"{statistics.mean(values):.1f}"
        axis.annotate(label, (max(values), place), xytext=(8, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("AP, or what the label names, per cent (bar: mean, dots: seeds)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _short(commit: str | None) -> str:
    """Abbreviated commit, with "+" if the tree differed from it."""
    return (commit or "unknown")[:12] + ("+" if (commit or "").endswith("+") else "")


def write_results(
    name: str, out: Path, seeds: list[int], target: Path, arguments: str, recorded: Path | None = None
) -> None:
    """Write <name>.md, .json and .png of a study from the finished runs.

    Args:
        name: of STUDIES.
        out: folder of the runs.
        seeds: of every row.
        target: folder of the results.
        arguments: of the command, for the page.
        recorded: a results file with runs to use where `out` has none.
    """
    study = STUDIES[name]
    found = read(study, out, seeds)
    added = add_recorded(found, study, seeds, recorded) if recorded else 0
    if not found:
        raise SystemExit(f"study: {out} must hold finished runs, got none")
    runs = [run for by_seed in found.values() for run in by_seed.values()]
    commits = sorted({_short(run["commit"]) for run in runs})
    wanted = len(seeds) * len(study.runs)
    lines = [
        f"# {study.title}",
        "",
        f"Command: `python -m benchmarks.study{arguments}` ({len(runs)} of {wanted} runs finished). Runs by commit "
        f"{', '.join(commits)}, torch {runs[0]['torch']}, {runs[0]['batch_size']} images a step. {study.about}",
        "",
        *table(study, found, seeds),
        "",
        *(
            [f"{added} of the runs were recorded earlier (`--recorded`); their commits are in {name}.json.", ""]
            if added
            else []
        ),
        "Gains compare runs of the same seed. `step` is the time of a training step against the student's alone,",
        "`memory` the extra peak, both measured in the run itself, turn and turn about (the cost ledger); the last",
        "column adds the training of the teacher, spread over the run's steps, in per cent of the student's step.",
        "",
        f"![AP of every run]({name}.png)",
        "",
        "Teachers (made by `python -m benchmarks.study.assets`):",
        "",
        *teacher_lines(),
        "",
        f"One run alone: `fastkd train {' '.join(arguments_of(study.rows[1].run))} --seed 1`.",
        "",
    ]
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    write_json(target / f"{name}.json", found)
    plot(study, found, target / f"{name}.png")
    print("\n".join(lines))


def main() -> None:
    """Train missing runs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(STUDIES), default="scenes", help="which table (default: scenes)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every row (default: 0 1 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the table")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, help="steps of every run, instead of the recipes'")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[run for study in STUDIES.values() for run in study.runs],
        help="only these runs, in this order",
    )
    parser.add_argument("--recorded", type=Path, help="results file (JSON) whose runs fill in what --out lacks")
    parser.add_argument("--only-write", action="store_true", help="train nothing, write the results of finished runs")
    chosen = parser.parse_args()
    overrides = ["--schedule.steps", str(chosen.steps)] if chosen.steps else []
    chosen.out.mkdir(parents=True, exist_ok=True)
    if not chosen.only_write:
        for data in STUDIES[chosen.study].data:
            subprocess.run([sys.executable, "-m", "fastkd.cli", "data", *data], check=True)
        names = chosen.rows or STUDIES[chosen.study].runs
        with ThreadPoolExecutor(chosen.jobs) as pool:
            runs = [pool.submit(train, chosen.out, name, seed, 1, overrides) for seed in chosen.seeds for name in names]
            for run in runs:
                run.result()
    arguments = f" --study {chosen.study}" if chosen.study != "scenes" else ""
    arguments += f" --steps {chosen.steps}" if chosen.steps else ""
    if chosen.seeds != parser.get_default("seeds"):
        arguments += f" --seeds {' '.join(map(str, chosen.seeds))}"
    write_results(chosen.study, chosen.out, chosen.seeds, chosen.results, arguments, chosen.recorded)


if __name__ == "__main__":
    main()
