"""Gains of several seeds with confidence intervals, and the parts of a gain that inheriting and the method have."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from fastkd.report.html import Cell, Section, paragraph, table
from fastkd.report.runs import Run, baseline_of


@dataclass(frozen=True)
class Mean:
    """Mean of several values, with its 95 % confidence interval by Student's t."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high); None for a single value."""
        count = len(self.values)
        if count < 2:
            return None
        from scipy.special import stdtrit  # scipy.stats takes a second to import

        half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(self.values) / count**0.5
        return self.mean - half, self.mean + half

    @property
    def signed(self) -> str:
        """For tables: "+1.3 (+0.9 .. +1.7)"; without an interval "+1.3"."""
        ends = self.interval
        return f"{self.mean:+.1f}" + ("" if ends is None else f" ({ends[0]:+.1f} .. {ends[1]:+.1f})")

    @property
    def is_clear(self) -> bool:
        """Whether an interval is known and excludes 0."""
        ends = self.interval
        return ends is not None and (ends[0] > 0 or ends[1] < 0)


def groups(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs that differ only in the seed, by the name of the first of them; the order of the runs is kept."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.recipe.items() if key != "seed"}
        found.setdefault((run.is_teacher, repr(settings) if settings else run.name), []).append(run)
    return {members[0].name: members for members in found.values()}


def ap_of(runs: list[Run]) -> Mean | None:
    """Mean AP of the runs; None if none has one."""
    values = [value for run in runs if (value := run.score("bbox", "AP")) is not None]
    return Mean(tuple(values)) if values else None


def gain_of(members: list[Run], runs: list[Run], inherits: bool = False) -> Mean | None:
    """Mean gain of a group's AP, seed by seed, over the undistilled run of the same seed; None if there is none.

    Args:
        members: the runs of the group.
        runs: all runs.
        inherits: compare with the run that inherits the teacher's neck and head.
    """
    gains = []
    for run in members:
        other = baseline_of(run, runs, inherits=inherits)
        pair = run.score("bbox", "AP"), None if other is None else other.score("bbox", "AP")
        if pair[0] is not None and pair[1] is not None:
            gains.append(pair[0] - pair[1])
    return Mean(tuple(gains)) if gains else None


def attribution(runs: list[Run]) -> list[str]:
    """For every method that inherits: which part of its gain is inheriting's and which is the method's own."""
    lines = []
    for name, members in groups(runs).items():
        run = members[0]
        if run.method is None or not run.inherits:
            continue
        whole, own = gain_of(members, runs), gain_of(members, runs, inherits=True)
        if whole is None:
            continue
        if own is None:
            lines.append(
                f"{name} gains {whole.signed} AP over the baseline, and starts from the teacher's neck and head: train "
                "a student that only inherits to see which part is the method's"
            )
            continue
        label = run.settings.label if run.settings is not None else run.method
        verdict = ""
        if own.interval is None:
            verdict = "; one seed cannot tell a part below a point or two from chance"
        elif not own.is_clear:
            verdict = "; this interval holds 0, so the method's own part is not shown"
        lines.append(
            f"{name} gains {whole.signed} AP over the baseline: {whole.mean - own.mean:+.1f} of it by inheriting the "
            f"teacher's neck and head, which a student without {label} has as well, and {own.signed} by {label} "
            f"itself{verdict}"
        )
    return lines


def when_it_pays(runs: list[Run]) -> list[str]:
    """One sentence for each method among the runs on when it pays."""
    kinds = {run.settings.label: run.settings.pays for run in runs if run.settings is not None and run.settings.pays}
    lines = [f"{label} {text}" for label, text in kinds.items()]
    if any(run.inherits for run in runs):
        lines.append(
            "Inheriting costs nothing and pays wherever teacher and student share neck and head; it needs a teacher of "
            "the same detector."
        )
    return lines


def add_seeds(section: Section, runs: list[Run], colours: dict[str, str]) -> None:
    """Adds the means over the seeds to the results, if any run was repeated with another seed."""
    repeated = groups(runs)
    if all(len(members) < 2 for members in repeated.values()):
        return
    rows = []
    for name, members in repeated.items():
        ap, gain = ap_of(members), gain_of(members, runs)
        own = gain_of(members, runs, inherits=True) if members[0].inherits and members[0].method else None
        cells = [str(len(members)), "\u2013" if ap is None else f"{ap.mean:.1f}"]
        cells += ["\u2013" if value is None else value.signed for value in (gain, own)]
        rows.append([Cell(name, colour=colours[name]), members[0].role, *cells])
    header = ["over the seeds", "what it is", "runs", "mean AP", "gain (95 % interval)", "over inheriting alone"]
    section.add(
        table(header, rows, text_columns=2),
        paragraph(
            "Gains are means of the differences between runs of the same seed, with 95 % confidence intervals by "
            "Student\u2019s t. An interval that holds 0 shows no gain."
        ),
    )
