"""The section on the diagnostics of the methods (methods 9): what was there to be learned, and what was."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastkd.report import plots
from fastkd.report.html import Cell, PictureBook, Section, clean, folded, note, paragraph, table
from fastkd.report.runs import Run, number

MOST_PANELS = 10
FINE = ("gap_", "instructive_loss_")  # figures of single losses, in the table but not in the picture


def teaching_section(runs: list[Run], colours: dict[str, str], book: PictureBook) -> Section:
    """The diagnostics of every run over the steps, and the method's findings on them."""
    section = Section("How well the methods taught")
    series = {run.name: diagnostics(run) for run in runs}
    taught = [run for run in runs if series[run.name]]
    if not taught:
        return section
    section.add(
        paragraph(
            "What stands between a method and a gain. <em>Gap</em>: the student\u2019s detection loss minus the "
            "instructive pyramid\u2019s on the same images; above 0, the labels made a better pyramid than the "
            "student\u2019s. <em>Instructive AP</em> and <em>teacher AP</em>: the validation AP of what the student "
            "imitates. <em>Imitation error</em>: 0 if the student equals its teacher. <em>Inside boxes</em>: the share "
            "of the imitation\u2019s weights that lies on objects, beside the share if the weights were even."
        )
    )
    for run in taught:
        lines = _findings(run)
        if lines:
            section.add(note([f"{run.name}: {line}" for line in lines]))
    names = list(dict.fromkeys(name for run in taught for name in series[run.name]))
    drawn = [name for name in names if not name.rpartition(".")[2].startswith(FINE)][:MOST_PANELS]
    panels = [
        (
            _title(name),
            [(run.name, colours[run.name], *series[run.name][name]) for run in taught if name in series[run.name]],
        )
        for name in drawn
    ]
    if panels:
        picture = plots.curves(panels)
        caption = "The diagnostics over the steps. A point of a curve comes from one batch, an AP from all images."
        section.add(book.figure(picture, "diagnostics", "Curves of the methods\u2019 diagnostics", caption))
    section.add(folded("Table of all diagnostics", _table(taught, series, colours)))
    return section


def diagnostics(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{figure: (steps, values)} of a run's log and metrics."""
    points: dict[str, dict[float, float]] = {}
    for record in records(run):
        figures = record.get("diagnostics")
        for name, given in (figures if isinstance(figures, dict) else {}).items():
            value = number(given)
            if value is not None:
                points.setdefault(clean(name, 60), {})[record["step"]] = value
    return {
        name: (np.array(sorted(values)), np.array([values[s] for s in sorted(values)]))
        for name, values in points.items()
    }


def records(run: Run) -> list[dict[str, Any]]:
    """The log of a run, and its metrics as the last record; only records with a step."""
    metrics = {**run.metrics, "step": run.metrics.get("steps")}
    return [record for record in (*run.log, metrics) if number(record.get("step"), 0) is not None]


def _findings(run: Run) -> list[str]:
    """What the method says about its diagnostics; [] for a method or settings that are not known."""
    if run.settings is None:
        return []
    try:
        method = run.settings.from_dict(run.recipe["method"])
    except (ValueError, KeyError, TypeError):
        return []
    return [clean(finding.message, 400) for finding in method.teaching_advice(records(run))]


def _title(name: str) -> str:
    return name.replace("_", " ").replace("AP", "AP, %")


def _table(runs: list[Run], series: dict[str, dict], colours: dict[str, str]) -> str:
    rows = []
    for run in runs:
        for name, (steps, values) in series[run.name].items():
            first, last = (f"{values[place]:.3g} (step {steps[place]:.0f})" for place in (0, -1))
            rows.append([Cell(run.name, colour=colours[run.name]), _title(name), first, last])
    return table(["run", "figure", "first", "last"], rows, text_columns=2)
