"""The cost section: the ledger (methods.md 4) of every run."""

from __future__ import annotations

from typing import Any

from fastkd.report import plots
from fastkd.report.html import Cell, PictureBook, Section, escape, note, paragraph, table
from fastkd.report.numbers import UNKNOWN, duration, shown
from fastkd.report.runs import Run, number

MIB = 2.0**20


def entry(run: Run, *keys: str) -> float | None:
    """The finite number under ledger[keys...], else None."""
    value: Any = run.ledger
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return number(value)


def interval(run: Run, *keys: str) -> tuple[float, float] | None:
    """The 95 % confidence interval under ledger[keys...]; None if the run was measured with too few pairs of steps."""
    value: Any = run.ledger
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def share(run: Run) -> str:
    """Extra step time relative to the student's step with its interval, e.g. "+40 % (+31 .. +52)"."""
    ratio, ends = entry(run, "extra", "ratio"), interval(run, "extra", "ratio_interval")
    alone, extra = entry(run, "student", "seconds_per_step"), entry(run, "extra", "seconds_per_step")
    if ratio is None:  # a ledger of an earlier version
        ratio = 1 + extra / alone if alone and extra is not None else None
    if ratio is None:
        return UNKNOWN
    shown_ends = "interval unknown" if ends is None else " .. ".join(f"{100 * (end - 1):+.0f}" for end in ends)
    return f"{100 * (ratio - 1):+.0f} % ({shown_ends})"


def needs_teacher(run: Run) -> bool:
    """Whether the run requires a trained teacher."""
    return isinstance(run.recipe.get("teacher"), str)


def cost_section(runs: list[Run], colours: dict[str, str], book: PictureBook) -> Section:
    """Step time and peak memory of the student alone, with the method, and including the teacher's training."""
    section = Section("What it cost")
    section.add(
        paragraph(
            "The student alone and with the method took training steps in turn, on the same batches in the same run; "
            "times are medians. <em>Extra</em> is what the method adds: the median over the pairs of steps, with its "
            "95 % confidence interval. A method that needs a pretrained teacher also pays for training that teacher: "
            "<em>extra with teacher</em> adds it, spread over the student\u2019s steps; its time is the one recorded "
            "where it was trained, perhaps on another machine."
        )
    )
    measured = [run for run in runs if entry(run, "student", "seconds_per_step") is not None]
    lines = [
        f"{run.name} has no ledger.json with measurements."
        for run in runs
        if run not in measured and not run.is_teacher
    ]
    if measured:
        section.add(_step_table(measured, colours), _run_table(measured, colours))
        section.add(*_pictures(measured, book), *_sentences(measured))
        lines += _unknown_teachers(measured)
        devices = {str(run.ledger.get("device")) for run in measured}
        if len(devices) > 1:
            lines.append(
                f"The runs were measured on different devices ({', '.join(sorted(devices))}): compare shares, not "
                f"seconds."
            )
    section.add(note(lines))
    return section


def _step_table(runs: list[Run], colours: dict[str, str]) -> str:
    header = ["one step", "student alone", "with method", "extra", "extra with teacher"]
    header += ["memory alone", "with method", "extra"]
    rows = []
    for run in runs:
        seconds = [
            entry(run, name, "seconds_per_step") for name in ("student", "with_method", "extra", "extra_with_teacher")
        ]
        memory = [entry(run, name, "peak_bytes") for name in ("student", "with_method", "extra")]
        if run.method is None:
            seconds[1] = seconds[2] = memory[1] = memory[2] = None
            seconds[3] = seconds[3] if needs_teacher(run) else None
        cells = [_seconds(value, signed=place >= 2) for place, value in enumerate(seconds)]
        cells += [_mebibytes(value, signed=place == 2) for place, value in enumerate(memory)]
        if seconds[2] is not None and seconds[0]:
            cells[2] += f": {share(run)}"
        if memory[2] is not None and memory[0]:
            cells[6] += f" ({100 * memory[2] / memory[0]:+.0f} %)"
        rows.append([Cell(run.name, colour=colours[run.name]), *cells])
    return table(header, rows)


def _run_table(runs: list[Run], colours: dict[str, str]) -> str:
    rows = []
    for run in runs:
        student, extra = entry(run, "run", "student_seconds"), entry(run, "run", "extra_seconds")
        teacher, whole = entry(run, "teacher", "seconds"), entry(run, "extra_with_teacher", "seconds")
        rows.append(
            [
                Cell(run.name, colour=colours[run.name]),
                shown(entry(run, "run", "steps"), 0),
                duration(student),
                _with_interval(extra, interval(run, "run", "extra_interval")) if run.method else UNKNOWN,
                (duration(teacher) if teacher is not None else "not known") if needs_teacher(run) else UNKNOWN,
                duration(whole) if whole is not None and (run.method or needs_teacher(run)) else UNKNOWN,
                _multiple(run, student, whole),
            ]
        )
    header = [
        "the whole run",
        "steps",
        "student alone",
        "extra",
        "teacher\u2019s training",
        "extra with teacher",
        "in all",
    ]
    return table(header, rows)


def _multiple(run: Run, student: float | None, whole: float | None) -> str:
    """The whole run's time as a multiple of the student's alone, with the interval of the extra time."""
    if whole is None or not student:
        return UNKNOWN
    ends = interval(run, "extra_with_teacher", "interval")
    shown_ends = "" if ends is None else f" ({1 + ends[0] / student:.2f} .. {1 + ends[1] / student:.2f})"
    return f"x {1 + whole / student:.2f}{shown_ends}"


def _pictures(runs: list[Run], book: PictureBook) -> list[str]:
    names = [run.name for run in runs]
    timed = [(run, seconds) for run in runs if (seconds := entry(run, "run", "student_seconds")) is not None]
    figures = []
    if timed:
        alone = [seconds / 60 for _, seconds in timed]
        extra = [(entry(run, "run", "extra_seconds") or 0.0) / 60 for run, _ in timed]
        teacher = [(entry(run, "teacher", "seconds") or 0.0) / 60 for run, _ in timed]
        ends = [interval(run, "run", "extra_interval") for run, _ in timed]
        picture = plots.cost_bars(
            [run.name for run, _ in timed], alone, extra, teacher, "minutes of training, the whole run",
            [None if pair is None else (pair[0] / 60, pair[1] / 60) for pair in ends],
        )  # fmt: skip
        caption = (
            "Training time of the whole run. The number at each bar is the multiple of the student alone; the black "
            "line is the 95 % confidence interval of the extra time."
        )
        figures.append(book.figure(picture, "cost_time", "Bar chart of training time", caption))
    peaks = [peak for run in runs if (peak := entry(run, "student", "peak_bytes")) is not None]
    if len(peaks) == len(runs):
        alone = [peak / MIB for peak in peaks]
        extra = [(entry(run, "extra", "peak_bytes") or 0.0) / MIB if run.method else 0.0 for run in runs]
        picture = plots.cost_bars(names, alone, extra, [0.0] * len(runs), "peak memory of a training step, MiB")
        caption = "Peak memory of a training step: weights, optimiser states, activations, and the teacher if any."
        figures.append(book.figure(picture, "cost_memory", "Bar chart of peak memory", caption))
    return figures


def _sentences(runs: list[Run]) -> list[str]:
    """Compares a method's extra cost with that of its `compared_with` method, as far as the intervals allow."""
    lines = []
    for run in runs:
        rival = run.settings and run.settings.compared_with
        other = next((one for one in runs if one.method == rival and one.detector == run.detector), None)
        if not rival or other is None:
            continue
        comparisons = (
            _comparison(run, other, ("run", "extra_seconds"), ("run", "extra_interval"), "in training itself"),
            _comparison(
                run,
                other,
                ("extra_with_teacher", "seconds"),
                ("extra_with_teacher", "interval"),
                "with the teacher\u2019s training, taken as recorded, perhaps on another machine",
            ),
        )
        lines += [paragraph(text) for text in comparisons if text]
    return lines


def _comparison(run: Run, other: Run, value: tuple[str, str], ends: tuple[str, str], words: str) -> str:
    """Which of two runs takes more extra time; that this cannot be told if their intervals overlap or are unknown."""
    mine, theirs = entry(run, *value), entry(other, *value)
    if mine is None or theirs is None:
        return ""
    first, second = interval(run, *ends), interval(other, *ends)
    if first is None or second is None:
        names = f"{escape(run.name)} ({duration(mine)}) and {escape(other.name)} ({duration(theirs)})"
        return (
            f"Extra time {words} of {names}: not compared, since their ledgers hold too few pairs of steps for an "
            "interval."
        )
    names = f"{escape(run.name)} ({_with_interval(mine, first)}) and {escape(other.name)} "
    names += f"({_with_interval(theirs, second)})"
    if first[0] <= second[1] and second[0] <= first[1]:
        return f"Extra time {words}: this measurement cannot tell {names} apart, as their intervals overlap."
    less = first[1] < second[0]
    return f"Extra time {words}: {names} differ; {escape((run if less else other).name)} takes less."


def _with_interval(seconds: float | None, ends: tuple[float, float] | None) -> str:
    """A time with its interval, in minutes from 90 seconds on."""
    if seconds is None or ends is None:
        return duration(seconds)
    unit, word = (60, "min") if max(map(abs, (seconds, *ends))) >= 90 else (1, "s")
    return f"{seconds / unit:.1f} {word}, {ends[0] / unit:.1f} .. {ends[1] / unit:.1f}"


def _unknown_teachers(runs: list[Run]) -> list[str]:
    unknown = [run for run in runs if needs_teacher(run) and entry(run, "teacher", "seconds") is None]
    return [f"{run.name}: what training its teacher ({run.recipe['teacher']}) took is not known." for run in unknown]


def _seconds(value: float | None, signed: bool) -> str:
    return UNKNOWN if value is None else f"{value:{'+' if signed else ''}.3f} s"


def _mebibytes(value: float | None, signed: bool) -> str:
    return UNKNOWN if value is None else f"{value / MIB:{'+' if signed else ''},.0f} MiB"
