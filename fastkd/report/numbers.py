"""The numerical sections: AP and gains, classes and sizes, training curves."""

from __future__ import annotations

import numpy as np

from fastkd.report import plots
from fastkd.report.html import Cell, PictureBook, Section, card, clean, escape, folded, note, paragraph, table
from fastkd.report.runs import Run, baseline_of, difference_in_conditions, number
from fastkd.report.seeds import add_seeds, attribution, when_it_pays

SIZE_KEYS = {"APs": "small", "APm": "medium", "APl": "large"}
COCO_DETAILS = {"AP50": "AP50", "AP75": "AP75"} | {name: key for key, name in SIZE_KEYS.items()}
CROWD_DETAILS = {"MR\u207b\u00b2 (lower is better)": "MR", "JI": "JI", "recall": "recall"}
UNKNOWN = "\u2013"
MOST_CLASSES_IN_PLOT = 16
MOST_PANELS = 14
AP_PANEL = "AP on the validation images"


def run_colours(runs: list[Run]) -> dict[str, str]:
    """{run name: colour}: grey for a teacher, a distinct colour for each other run."""
    others = [run.name for run in runs if not run.is_teacher]
    return {run.name: plots.run_colour(0 if run.is_teacher else 1 + others.index(run.name) % 9) for run in runs}


def gain(run: Run, other: Run | None, *keys: str) -> float | None:
    """AP of `run` minus AP of `other`; None if either is unknown."""
    mine = run.score(*keys)
    theirs = None if other is None else other.score(*keys)
    return None if mine is None or theirs is None else mine - theirs


def shown(value: float | None, digits: int = 1) -> str:
    """A number for a table; a dash if it is unknown."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def gain_cell(value: float | None) -> Cell:
    """A signed difference, coloured by its sign."""
    if value is None:
        return Cell(UNKNOWN)
    return Cell(f"{value:+.1f}", "up" if value > 0.05 else "down" if value < -0.05 else "")


def cards(runs: list[Run], colours: dict[str, str]) -> list[str]:
    """One summary card per run: its AP, and the gain over its baseline."""
    result = []
    for run in runs:
        difference = gain(run, baseline_of(run, runs), "bbox", "AP")
        remark = f"AP, {difference:+.1f} over the baseline" if difference is not None else f"AP, {run.role}"
        result.append(card(run.name, shown(run.score("bbox", "AP")), remark, colours[run.name]))
    return result


def results_section(runs: list[Run], colours: dict[str, str], book: PictureBook) -> Section:
    """AP of every run with gains over the baseline and over the inheriting control."""
    section = Section("Results")
    if all(run.score("bbox", "AP") is None for run in runs):
        section.add(
            note(
                [
                    "No run has an AP yet: metrics.json is missing or holds none. Train to the end, or run `fastkd "
                    "evaluate`."
                ]
            )
        )
        return section
    section.add(
        paragraph(
            "AP is COCO's average precision in percent, averaged over classes and over IoU thresholds from 0.50 to "
            "0.95; higher is better. <em>Gain</em> compares with the baseline: the same detector, data, steps and "
            "seed, trained without a method."
        ),
        _ap_table(runs, colours),
        note(_unequal_conditions(runs)),
    )
    add_seeds(section, runs, colours)
    section.add(*(paragraph(escape(f"{line}.")) for line in attribution(runs)))
    pays = when_it_pays(runs)
    if pays:
        section.add("<h3>When does it pay?</h3>", *(paragraph(escape(line)) for line in pays))
    names = [run.name for run in runs]
    bars = plots.ap_bars(
        names, [run.score("bbox", "AP") for run in runs], [colours[name] for name in names], "box AP, %"
    )
    section.add(
        book.figure(bars, "ap", "Bar chart of the box AP of every run", "Box AP of every run on the validation images.")
    )
    return section


def _ap_table(runs: list[Run], colours: dict[str, str]) -> str:
    several_detectors = len({_detector_name(run) for run in runs}) > 1
    control = any(baseline_of(run, runs, inherits=True) for run in runs)
    masks = any(run.score("segm", "AP") is not None for run in runs)
    header = ["run", "what it is"] + (["detector"] if several_detectors else []) + ["AP", "gain"]
    crowd = any(run.score("bbox", "MR") is not None for run in runs)
    details = CROWD_DETAILS if crowd else COCO_DETAILS
    header += (["gain over inheriting alone"] if control else []) + list(details)
    header += (["mask AP", "gain"] if masks else []) + ["steps", "seed"]
    best = max((run.score("bbox", "AP") or 0.0 for run in runs if not run.is_teacher), default=0.0)
    rows = []
    for run in runs:
        value = run.score("bbox", "AP")
        row = [Cell(run.name, colour=colours[run.name]), run.role] + (
            [_detector_name(run)] if several_detectors else []
        )
        row.append(Cell(shown(value), "best" if value and value == best and not run.is_teacher else ""))
        row.append(gain_cell(gain(run, baseline_of(run, runs), "bbox", "AP")))
        if control:
            inherits = run.inherits and run.method is not None
            row.append(
                gain_cell(gain(run, baseline_of(run, runs, inherits=True), "bbox", "AP")) if inherits else UNKNOWN
            )
        row += [shown(run.score("bbox", key)) for key in details.values()]
        if masks:
            row += [shown(run.score("segm", "AP")), gain_cell(gain(run, baseline_of(run, runs), "segm", "AP"))]
        row += [_count(run.metrics.get("steps")), _count(run.metrics.get("seed", run.recipe.get("seed")))]
        rows.append(row)
    return table(header, rows, text_columns=3 if several_detectors else 2)


def _unequal_conditions(runs: list[Run]) -> list[str]:
    lines = []
    for run in runs:
        other = baseline_of(run, runs)
        names = difference_in_conditions(run, other) if other else []
        if names and other:
            lines.append(
                f"{run.name} and {other.name} differ in {', '.join(names)}: their difference in AP is not the method's "
                f"alone."
            )
        if run.method and other is None:
            lines.append(
                f"{run.name} has no baseline here: no undistilled run with the same detector and seed was given."
            )
    commits = {str(run.metrics["commit"])[:12] for run in runs if run.metrics.get("commit") and not run.is_teacher}
    if len(commits) > 1:
        lines.append(f"The runs were made at different commits ({', '.join(sorted(commits))}).")
    return lines


def _detector_name(run: Run) -> str:
    if isinstance(run.detector.get("custom"), str):
        return str(run.detector["custom"])
    parts = [str(run.detector.get(key)) for key in ("detector", "backbone") if run.detector.get(key)]
    return " ".join(parts) or UNKNOWN


def _count(value) -> str:
    value = number(value)
    return UNKNOWN if value is None else f"{value:,.0f}"


def classes_section(runs: list[Run], colours: dict[str, str], book: PictureBook) -> Section:
    """AP per object size and per class."""
    section = Section("By size and class")
    measured = [run for run in runs if run.score("bbox", "AP") is not None]
    names = [run.name for run in measured]
    run_colours_ = [colours[name] for name in names]
    sizes = [key for key in SIZE_KEYS if any(run.score("bbox", key) is not None for run in measured)]
    if sizes:
        values = np.array([[_or_nan(run.score("bbox", key)) for key in sizes] for run in measured])
        picture = plots.grouped_bars([SIZE_KEYS[key] for key in sizes], names, values, run_colours_, "box AP, %")
        caption = (
            "AP by the size of the object in the image file: small is under 32 x 32 pixels, large over 96 x 96. Small "
            "objects are usually where a small student is weakest."
        )
        if len(sizes) < len(SIZE_KEYS):
            absent = " or ".join(text for key, text in SIZE_KEYS.items() if key not in sizes)
            caption += f" The validation images hold no {absent} objects by these limits."
        section.add(book.figure(picture, "ap_by_size", "Bar chart of AP by object size", caption))
    classes = _classes(measured)
    if not classes:
        return section
    plotted = classes
    caption = "AP of each class."
    if len(classes) > MOST_CLASSES_IN_PLOT:
        plotted = _differing_classes(measured, runs, classes)
        caption = (
            f"The {len(plotted)} of {len(classes)} classes in which the runs differ most; the table below has all."
        )
    values = np.array([[_or_nan(run.score("bbox", "per_class", name, "AP")) for name in plotted] for run in measured])
    picture = plots.grouped_bars(plotted, names, values, run_colours_, "box AP, %")
    section.add(book.figure(picture, "ap_by_class", "Bar chart of AP by class", caption))
    section.add(folded(f"Table of all {len(classes)} classes", _class_table(measured, classes)))
    return section


def _classes(runs: list[Run]) -> list[str]:
    names: dict[str, None] = {}
    for run in runs:
        box = run.metrics.get("bbox")
        per_class = box.get("per_class") if isinstance(box, dict) else None
        names.update(dict.fromkeys(per_class if isinstance(per_class, dict) else {}))
    return list(names)


def _differing_classes(runs: list[Run], all_runs: list[Run], classes: list[str]) -> list[str]:
    def spread(name: str) -> float:
        scores = (run.score("bbox", "per_class", name, "AP") for run in runs if not run.is_teacher)
        values = [value for value in scores if value is not None]
        return max(values) - min(values) if values else -1.0

    chosen = set(sorted(classes, key=spread, reverse=True)[:MOST_CLASSES_IN_PLOT])
    return [name for name in classes if name in chosen]


def _class_table(runs: list[Run], classes: list[str]) -> str:
    rows = []
    for name in classes:
        values = [run.score("bbox", "per_class", name, "AP") for run in runs]
        best = max((value for value in values if value is not None), default=None)
        boxes = next(
            (b for b in (run.score("bbox", "per_class", name, "instances") for run in runs) if b is not None), None
        )
        cells = [Cell(shown(value), "best" if value and value == best else "") for value in values]
        rows.append([name, _count(boxes), *cells])
    return table(["class", "boxes", *(clean(run.name, 24) for run in runs)], rows)


def curves_section(runs: list[Run], colours: dict[str, str], book: PictureBook) -> Section:
    """Losses, learning rates and AP over the steps, from log.jsonl."""
    section = Section("Training curves")
    series = {run.name: curve_points(run) for run in runs}
    order: dict[str, None] = {}
    for by_title in series.values():
        order.update(dict.fromkeys(by_title))
    titles = sorted(order, key=_panel_rank)
    if not titles:
        section.add(note(["No run has a log.jsonl with steps, so there are no curves."]))
        return section
    panels = []
    for title in titles[:MOST_PANELS]:
        lines = [(run.name, colours[run.name], *series[run.name][title]) for run in runs if title in series[run.name]]
        panels.append((title, lines))
    wide = [title for title, lines in panels if title == "total loss" and _wide_range(lines)]
    caption = (
        "Each line is one run; losses are moving averages. The detection losses of a distilled run are comparable with "
        "the baseline\u2019s; its total is not, since it also holds the method\u2019s own losses."
    )
    if len(titles) > MOST_PANELS:
        caption += " Left out to keep the picture readable: " + escape(", ".join(titles[MOST_PANELS:])) + "."
    section.add(book.figure(plots.curves(panels, wide), "training_curves", "Training curves of all runs", caption))
    return section


def curve_points(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{panel title: (steps, values)} of a run's log."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in run.log:
        step = number(record.get("step"), 0)
        if step is None:
            continue
        for title, value in _titled(record):
            points.setdefault(title, []).append((step, value))
    final, last = run.score("bbox", "AP"), number(run.metrics.get("steps"))
    if AP_PANEL in points and final is not None and last is not None:
        points[AP_PANEL].append((last, final))
    result = {}
    for title, pairs in points.items():
        table_ = np.array(sorted(dict(pairs).items()))  # a resumed run may log a step twice: keep the later record
        values = table_[:, 1]
        if not title.startswith(("learning rate", "AP ")):
            values = plots.smooth(values, max(1, len(values) // 25))
        result[title] = (table_[:, 0], values)
    return result


def _titled(record: dict):
    """(panel title, value) of the numbers in a log record that are plotted."""
    losses = record.get("losses")
    for name, given in (losses if isinstance(losses, dict) else {}).items():
        value = number(given)
        if value is not None:
            yield f"loss: {clean(name, 40)}", value
    total = number(record.get("loss"))
    if total is not None:
        yield "total loss", total
    rates = record.get("lr")
    for name, given in (rates if isinstance(rates, dict) else {"": rates}).items():
        value = number(given)
        if value is not None:
            yield f"learning rate: {clean(name, 30)}".rstrip(": "), value
    box = record.get("bbox")
    value = number(box.get("AP")) if isinstance(box, dict) else number(record.get("AP"))
    if value is not None:
        yield AP_PANEL, value


def _panel_rank(title: str) -> tuple[int, str]:
    kinds = ("total loss", "AP ", "learning rate", "loss: ")
    return next((rank for rank, kind in enumerate(kinds) if title.startswith(kind)), len(kinds)), title


def _wide_range(lines) -> bool:
    values = np.concatenate([line[3] for line in lines])
    return bool((values > 0).all() and values.max() > 30 * values.min())


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def duration(seconds) -> str:
    """Seconds in a readable unit: 45 s, 12 min, 3.5 h."""
    seconds = number(seconds, 0)
    if seconds is None:
        return UNKNOWN
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
