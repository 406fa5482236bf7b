"""Reads the diagnostics in a run's log (methods 9), and the findings on them that several methods share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastkd.training.doctor.finding import Finding

Log = Sequence[Mapping[str, Any]]  # the records of log.jsonl, and metrics.json with its step as the last
SHARED = ("AP", "teacher_AP")  # figures of the run, not of one of several methods
LITTLE_LEARNED = 0.95  # an imitation error above this fraction of its first value has not fallen
FOCUSED = 1.5  # a share inside the boxes, relative to that of even weights, from which the weights follow the boxes


@dataclass(frozen=True)
class Figures:
    """Figures of a run by name: [(step, value), ...] in order of the step.

    Besides those under "diagnostics", "AP" is the student's box AP.
    """

    series: Mapping[str, Sequence[tuple[int, float]]]

    @classmethod
    def read(cls, log: Log) -> Figures:
        """The figures of a log; entries that are no finite numbers are left out."""
        found: dict[str, list[tuple[int, float]]] = {}
        for record in log:
            figures, box = record.get("diagnostics"), record.get("bbox")
            values = dict(figures) if isinstance(figures, Mapping) else {}
            values["AP"] = box.get("AP") if isinstance(box, Mapping) else None
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    found.setdefault(name, []).append((record["step"], float(value)))
        return cls(found)

    def first(self, name: str) -> tuple[int, float] | None:
        """(step, value) of the first entry."""
        return self.series[name][0] if name in self.series else None

    def last(self, name: str) -> float | None:
        """The last value."""
        return self.series[name][-1][1] if name in self.series else None

    def now(self, name: str) -> float | None:
        """Mean of the last quarter of the values, at least one: a value comes from a single batch."""
        values = [value for _, value in self.series.get(name, ())]
        recent = values[-max(1, len(values) // 4) :]
        return math.fsum(recent) / len(recent) if recent else None


def log_of_part(log: Log, name: str) -> Log:
    """The log as one of several methods would have written it: without the other methods' figures."""

    def own(figures: Any) -> dict[str, Any]:
        items = figures.items() if isinstance(figures, Mapping) else ()
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in items if key.startswith(prefix) or key in SHARED}

    return [{**record, "diagnostics": own(record.get("diagnostics"))} for record in log]


def teacher_findings(figures: Figures) -> Iterator[Finding]:
    """Whether the teacher is better than the student, on the same images."""
    teacher, student = figures.last("teacher_AP"), figures.last("AP")
    if teacher is None or student is None:
        return
    text = f"the teacher's AP is {teacher:.1f}, the student's {student:.1f}"
    if teacher > student:
        yield Finding("ok", "teaching", text)
    else:
        yield Finding("warning", "teaching", f"{text}: it has little left to teach; train a better teacher")


def imitation_findings(figures: Figures, label: str) -> Iterator[Finding]:
    """Whether the student has come closer to the teacher since the first logged step."""
    first, now = figures.first("imitation_error"), figures.now("imitation_error")
    if first is None or now is None:
        return
    text = f"{label}'s imitation error was {first[1]:.3g} at step {first[0]} and is {now:.3g} now (0: as the teacher)"
    if now <= LITTLE_LEARNED * first[1]:
        yield Finding("ok", "teaching", text)
    else:
        advice = "the student comes no closer: raise --method.weight, train longer, or take a wider student"
        yield Finding("warning", "teaching", f"{text}: {advice}")


def inside_findings(figures: Figures, what: str, remedy: str) -> Iterator[Finding]:
    """Whether the weights of the imitation lie on the objects.

    Args:
        what: names the weights, as a plural or a mass noun.
        remedy: what to change if they do not.
    """
    inside, even = figures.now("inside_boxes"), figures.now("inside_if_even")
    if inside is None or even is None:
        return
    text = f"{inside:.0%} of the {what} lie inside the boxes, {even:.0%} would if spread evenly over the image"
    focused = inside >= min(FOCUSED * even, (1 + even) / 2)  # the second limit for boxes that fill most of the image
    yield Finding("ok" if focused else "warning", "teaching", text + ("" if focused else f": {remedy}"))
