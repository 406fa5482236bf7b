"""The page and the plot of a study."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import wrap
from benchmarks.study.records import COSTS, Record, by_run
from benchmarks.study.rows import Row, Study, arguments_of
from fastkd.assets import FOLDER
from fastkd.report.seeds import Mean
from fastkd.training.recipes.named import METHODS
from fastkd.training.recipes.pairs import PAIRS

PLAIN_COLOUR = "#9aa5b1"  # students without a method
COLOURS = ("#3b7dd8", "#d8743b", "#59a14f", "#c44e52", "#937860", "#17a2b8", "#8a5fb0")  # methods, in order
FULL_SIZE = Path("docs/results/step.json")  # of `make bench-step`
HEADS = ("student", "steps", "by seed", "mean", "s.d.", "gain over", "gain by seed", "mean gain, 95 % interval")
COST_HEADS = ("step", "with R50", "memory", "extra time with teacher's training", "seconds", "jumps")
ABOUT_GAINS = """Gains compare runs of the same seed; the interval is Student's t of the seeds' gains. `step` is the
time of a step of training against the student's alone, `memory` the extra peak, both measured in the run itself, in
turns (the cost ledger); `with R50` is the same ratio of a student with a ResNet-50 on an image of 800 x 1216
([step.md](step.md)), as a tiny student exaggerates what a method takes. The next column adds the training of the
teacher, spread over the run's steps, in per cent of the student's step. `seconds` is the median of the runs' durations
with their evaluation. `jumps` are those of the loss in the row's runs ([findings](findings.md#a-stable-recipe))."""


def gains(found: dict[str, dict[int, Record]], row: Row) -> dict[int, float]:
    """Gain in the row's metric over the control, per seed."""
    control, metric = found.get(row.control or "", {}), row.metric
    return {seed: run[metric] - control[seed][metric] for seed, run in found[row.run].items() if seed in control}


def full_size(run: str, saved: dict[str, Any]) -> str:
    """Step of a ResNet-50 with the run's method against the student's alone, "-" where it was not measured.

    Args: saved: what `make bench-step` wrote. In bfloat16 under autocast, or float32 where only that was measured.
    """
    _, rest = arguments_of(run)[0].split("-", 1)
    detector, method = rest.rsplit("-", 1)
    for row in saved["rows"]:
        if (row["detector"], row["images"], row["boxes"]) == (detector, 1, 7):
            for form in ("bfloat16", "float32"):
                pair = [row["entries"].get(f"{name}/{form}") for name in (method, "student")]
                if all(pair):
                    with_method, alone = (min(entry["seconds"]) for entry in pair)
                    return f"{with_method / alone:.2f} x"
    return "-"


def _cost(runs: Sequence[Record]) -> list[str]:
    """Step time relative to the student alone (median over runs), memory, time including the teacher's training."""
    timed = [run for run in runs if COSTS[0] in run]
    if not timed:
        return ["-"] * 3
    ratio = statistics.median(run["method_step"] / run["student_step"] for run in timed)
    memory = statistics.median(run["extra_bytes"] for run in timed) / 2**20
    whole = [run["with_teacher"] / run["student_step"] for run in timed if run["with_teacher"] is not None]
    return [f"{ratio:.2f} x", f"{memory:+.0f} MiB", f"{statistics.median(whole):+.0%}" if whole else "unknown"]


def table(study: Study, found: dict[str, dict[int, Record]], seeds: Sequence[int]) -> list[str]:
    """The Markdown table of AP, gains and cost."""
    heads = (*HEADS, *COST_HEADS)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    labels = {(row.run, row.metric): row.label for row in study.rows}
    saved = json.loads(FULL_SIZE.read_text(encoding="utf-8"))
    for row in study.rows:
        runs = found.get(row.run)
        if not runs:
            continue
        values = [run[row.metric] for run in runs.values()]
        gained = gains(found, row)
        cells = [row.label, str(next(iter(runs.values()))["steps"])]
        cells += [", ".join(f"{runs[seed][row.metric]:.1f}" if seed in runs else "-" for seed in seeds)]
        cells += [f"**{statistics.mean(values):.1f}**", f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"]
        cells += [labels[row.control, row.metric] if row.control and gained else "-"]
        cells += [", ".join(f"{gain:+.1f}" for gain in gained.values()) or "-"]
        cells += [f"**{Mean(tuple(gained.values())).signed}**" if gained else "-"]
        step, *others = _cost(list(runs.values()))
        cells += [step, full_size(row.run, saved), *others]
        cells += [f"{statistics.median(run['seconds'] for run in runs.values()):.0f}"]
        cells += [str(sum(run["jumps"] for run in runs.values()))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def teacher_lines() -> list[str]:
    """AP of the shipped teachers, from the JSON beside their weights."""
    lines = []
    for path in sorted(FOLDER.glob("*-teacher.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        lines.append(
            f"- {path.stem}: AP {facts['AP']:.1f} after {facts['steps']} steps ({facts['seconds'] / 60:.0f} min), "
            f"{facts['parameters'] / 1e6:.1f} M parameters, commit {(facts['commit'] or 'unknown')[:12]}"
        )
    return lines


def short(commit: str | None) -> str:
    """Abbreviated commit, with "+" if the tree differed from it."""
    return (commit or "unknown")[:12] + ("+" if (commit or "").endswith("+") else "")


def page(name: str, study: Study, records: Sequence[Record], seeds: Sequence[int], command: str) -> str:
    """The study in Markdown; says how many runs are missing.

    Args:
        name: of the study.
        study: its rows.
        records: finished runs.
        seeds: of every row.
        command: that makes the page.
    """
    found = by_run(records, seeds)
    runs = [run for runs in found.values() for run in runs.values()]
    origins = {key: ", ".join(sorted({str(run[key]) for run in runs})) for key in ("torch", "batch_size", "machine")}
    commits = ", ".join(sorted({short(run["commit"]) for run in runs}))
    head = (
        f"Command: `{command}` ({len(runs)} of {len(seeds) * len(study.runs)} runs finished). Runs by commit "
        f"{commits}, torch {origins['torch']}, {origins['batch_size']} images a step, {origins['machine']}, one thread "
        f"each. {study.about}"
    )
    example = " ".join(arguments_of(study.rows[0].run) + list(study.options))
    parts = [f"# {study.title}", wrap(head), "\n".join(table(study, found, seeds)), wrap(ABOUT_GAINS)]
    parts += [f"![AP of every run]({name}.png)", "Teachers (made by `python -m benchmarks.study.assets`):"]
    parts += ["\n".join(teacher_lines()), f"One run alone: `fastkd train {example} --seed 1`."]
    return "\n\n".join(parts) + "\n"


def plot(study: Study, found: dict[str, dict[int, Record]], path: Path) -> None:
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
