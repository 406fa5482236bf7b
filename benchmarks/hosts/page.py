"""docs/results/hosts.md from the records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.environment import wrap
from benchmarks.hosts.full import SIZES
from benchmarks.hosts.plan import (
    BATCH,
    LGD_SETTINGS,
    METHODS,
    START_CLASSES,
    Run,
    Trial,
    all_runs,
    images,
    recipe_of,
    settings,
    teacher_of,
)
from benchmarks.hosts.records import Record, find
from fastkd.report.seeds import Mean

HEAD = """Written by `python -m benchmarks.hosts`: generated scenes in each host's own data format, the host's own
training entry point, a larger teacher trained in the host, and the same steps, data order and settings for every
method. AP by pycocotools from the host's predictions on {val} validation images. Gains compare runs of the same seed;
the interval is Student's t of the seeds' gains, wide for three of them."""
TIMES = """Seconds are {clock} of one optimiser step of {batch} images, the least of three medians of short runs of
all methods, taken turn and turn about in one process. `times` compares with the host alone, `reference` is the same
step with plain torch in the place of the compiled kernels (`use_backend("reference")`). MiB: peak memory of a
run{memory}."""
SETTINGS = f"""ICD is attached by its name, with the settings of [the integrations](../integrations/index.md). LGD has
weight {LGD_SETTINGS["weight"]} and instructive weight {LGD_SETTINGS["instructive_weight"]} instead of the published 1,
which costs AP in runs as short as these ([findings](findings.md))."""
FULL_SIZE = """Methods by name, random weights and images, medians of three steps of one thread each: what a method adds
to a step where the student is not tiny. `times` and `reference` compare with the host alone. Lightning trains
torchvision's detectors."""
ABSENT = "missing"


def page(records: Sequence[Record], hosts: Sequence[str], seeds: Sequence[int], trial: Trial, device: str) -> str:
    """The results as markdown; says which runs are missing."""
    wanted = {run: find(records, run, settings(run, trial, device)) for run in all_runs(hosts, seeds)}
    missing = [run for run, record in wanted.items() if record is None]
    state = f"{len(wanted) - len(missing)} of {len(wanted)} runs are made."
    state += f" Missing: {names_of(missing)}." if missing else ""
    on_gpu = device == "cuda"
    clock, memory = ("wall time", " on the GPU") if on_gpu else ("CPU time", "'s process, with its libraries")
    times = TIMES.format(clock=clock, batch=BATCH, memory=memory)
    parts = ["# Distillation inside other training code\n"]
    parts += [f"\n{wrap(text)}\n" for text in (HEAD.format(val=images(trial)[1]), state, SETTINGS, times)]
    for host in hosts:
        teacher = teacher_of(host)
        trained = find(records, teacher, settings(teacher, trial, device))
        own = {run: record for run, record in wanted.items() if run.host == host}
        parts.append(section(host, own, trained, trial))
    return "".join(parts) + full_section({run.host: record for run, record in wanted.items() if run.method == "full"})


def full_section(full: dict[str, Record | None]) -> str:
    """The times at full size of the hosts."""
    lines = [
        "\n## A step at full size\n",
        wrap(FULL_SIZE) + "\n",
        "| host | student | teacher | alone, s | method | times | reference |",
        "|---|---|---|---|---|---|---|",
    ]
    for host, record in full.items():
        student, teacher, _ = SIZES[host]
        if record is None:
            lines.append(f"| {host} | {student} | {teacher} | {ABSENT} | | | |")
            continue
        seconds = record["seconds"]
        for method in METHODS[host][1:]:
            ratios = [seconds[name] / seconds["alone"] for name in (method, f"{method} reference") if name in seconds]
            cells = [host, student, teacher, f"{seconds['alone']:.2f}", method, *(f"{ratio:.2f}" for ratio in ratios)]
            lines.append(f"| {' | '.join(cells)} |{' |' * (len(ratios) == 1)}")
    return "\n".join(lines) + "\n"


def names_of(runs: Sequence[Run]) -> str:
    """For instance "lightning icd (seeds 0, 2)"; "cost" and "full" are the measurements of the times."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(f"{run.host} {run.method}", []).append(str(run.seed))
    return ", ".join(f"{name} ({'seed' if len(own) == 1 else 'seeds'} {', '.join(own)})" for name, own in seeds.items())


def section(host: str, wanted: dict[Run, Record | None], teacher: Record | None, trial: Trial) -> str:
    """Recipe, table and origin of one host's runs."""
    recipe = recipe_of(host, trial)
    lines = [f"\n## {host}\n"]
    start = ""
    if recipe.start_steps:
        start = f", after {recipe.start_steps} on other scenes with {START_CLASSES} other classes"
    student = f"Student: {recipe.student}; {recipe.steps} steps{start}, {_rate(recipe.rate)}."
    reached = f"AP {teacher['AP']:.1f}" if teacher else ABSENT
    steps, rate = recipe.teacher_steps, _rate(recipe.teacher_rate)
    lines.append(wrap(f"{student} Teacher: {recipe.teacher}; {steps} steps, {rate}, {reached}.") + "\n")
    made = [record for record in wanted.values() if record is not None]
    if not made:
        return "\n".join([*lines, "No run is made yet."]) + "\n"
    names = ("run", "AP by seed", "gain by seed", "mean gain, 95 % interval", "s a step", "times", "reference", "MiB")
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    by_method = {
        method: {run.seed: record for run, record in wanted.items() if run.method == method} for method in METHODS[host]
    }
    cost = next((record for run, record in wanted.items() if run.method == "cost"), None)
    lines += [f"| {' | '.join(row(method, by_method, cost))} |" for method in METHODS[host]]
    used = sorted({record["teacher_AP"] for record in made if "teacher_AP" in record})
    if len(used) > 1:
        lines.append(f"\nThe teacher was trained anew on other machines: AP {', '.join(f'{ap:.1f}' for ap in used)}.")
    origins = {name: sorted({record[name] for record in made}) for name in ("commit", "torch", "machine", "package")}
    thread = f"{', '.join(origins['machine'])}, one thread"
    origin = (
        f"Commit {', '.join(origins['commit'])}; {', '.join(origins['package'])}; torch {', '.join(origins['torch'])}"
    )
    return "\n".join([*lines, "", wrap(f"{origin}; {thread}.")]) + "\n"


def row(method: str, by_method: dict[str, dict[int, Record | None]], cost: Record | None) -> list[str]:
    """The cells of a method."""
    runs, alone = by_method[method], by_method["alone"]
    gains = {seed: record["AP"] - plain["AP"] for seed, record in runs.items() if record and (plain := alone[seed])}
    cells = [method, _list(record and record["AP"] for record in runs.values())]
    if method == "alone":
        cells += ["", ""]
    else:
        cells += [_list((gains.get(seed) for seed in runs), "{:+.1f}".format)]
        cells += [Mean(tuple(gains.values())).signed if gains else ABSENT]
    if cost is None:
        cells += [ABSENT] * 3
    else:
        seconds = cost["seconds"]
        cells += [f"{seconds[method]:.3f}", f"{seconds[method] / seconds['alone']:.2f}"]
        cells += [f"{seconds[f'{method} reference']:.3f}" if f"{method} reference" in seconds else ""]
    memory = [record["mebibytes"] for record in runs.values() if record]
    return [*cells, f"{statistics.fmean(memory):.0f}" if memory else ABSENT]


def _rate(rate: float | None) -> str:
    return "the host's learning rate" if rate is None else f"learning rate {rate:g}"


def _list(values: Iterable[float | None], text: Callable[[float], str] = "{:.1f}".format) -> str:
    return ", ".join(ABSENT if value is None else text(value) for value in values)
