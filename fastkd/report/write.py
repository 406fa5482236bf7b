"""Assembles the report."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fastkd.files import write_text
from fastkd.progress import track
from fastkd.report import cost, html, insides, mistakes, numbers, sources, teaching
from fastkd.report.html import PictureBook, Section, clean, escape
from fastkd.report.runs import Run, load_runs


def write_report(
    run_dirs,
    out,
    *,
    title: str = "Distillation report",
    images: int = 6,
    device: str = "cpu",
    picture_dir=None,
    command: str | None = None,
    methods: Mapping[str, Any] | None = None,
    notice: str | None = None,
) -> Path:
    """Writes one self-contained HTML file about one or several runs: numbers, curves, cost, pictures, mistakes.

    Missing files of a run directory are listed on the page.

    Args:
        run_dirs: run directories, in the order in which they appear on the page.
        out: the HTML file; its folder is made.
        title: heading of the page.
        images: number of validation images to show, >= 0.
        device: device of the networks whose attention or features are shown.
        picture_dir: folder to which every picture is also written as a PNG file, or None.
        command: the command line to show in the footer; None takes this process's.
        methods: kind -> settings class, `fastkd.training.methods.kinds()`; gives the methods' labels and views. Without
            it runs are labelled by kind, and the sections on their networks are omitted.
        notice: a sentence to show before the results, e.g. that the runs are too short to mean anything.
    Returns: the path of the file.
    Raises: ValueError if there is no run directory or `images` is negative.
    """
    if isinstance(images, bool) or not isinstance(images, int) or images < 0:
        raise ValueError(
            f"write_report: images must be an integer of at least 0, got {images!r}; pass 0 for no pictures of images"
        )
    if isinstance(run_dirs, (str, os.PathLike)):
        run_dirs = [run_dirs]
    runs = load_runs(run_dirs, methods)
    out = Path(out)
    book = PictureBook(None if picture_dir is None else Path(picture_dir))
    colours = numbers.run_colours(runs)
    plain = [
        numbers.results_section,
        numbers.classes_section,
        numbers.curves_section,
        teaching.teaching_section,
        cost.cost_section,
    ]
    sections = [make(runs, colours, book) for make in track(plain, "draw the curves and tables", "sections")]
    sections += [*_picture_sections(runs, images, device, book), _notes_section(runs)]
    if notice is not None:
        sections[0].parts.insert(0, html.note([notice]))
    page = html.page(title, _subtitle(runs), numbers.cards(runs, colours), sections, _footer(runs, command))
    write_text(out, page)
    return out


def _picture_sections(runs: list[Run], count: int, device: str, book: PictureBook) -> list[Section]:
    if count == 0:
        return []
    source, problem = sources.validation_set(runs)
    if source is None:
        section = Section("Detections beside the ground truth")
        section.add(html.note([f"No pictures of images: {problem}"]))
        return [section]
    judged = mistakes.judge_runs(source, runs)
    chosen = mistakes.choose_images(judged, count)
    sections = [
        mistakes.detections_section(judged, chosen, book),
        *insides.sections(runs, judged, chosen, device, book),
    ]
    if judged.judged:
        sections += [mistakes.false_positives_section(judged, book), mistakes.misses_section(judged, book)]
    if source.unreadable:
        lines = [f"Shown as plain grey, for the file cannot be read: {line}" for line in source.unreadable]
        sections[0].add(html.note(lines))
    return sections


def _subtitle(runs: list[Run]) -> str:
    images = next((value for value in (run.score("bbox", "images") for run in runs) if value is not None), None)
    text = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
    if images is not None:
        text += f", measured on {images:,.0f} validation images"
        text += (
            " (CrowdHuman's metrics)"
            if any(run.score("bbox", "MR") is not None for run in runs)
            else " with pycocotools"
        )
    return escape(f"{text}. Written {time.strftime('%Y-%m-%d %H:%M')}.")


def _notes_section(runs: list[Run]) -> Section:
    section = Section("What is missing")
    lines = [f"{run.name} ({run.path}): {line}" for run in runs for line in run.notes]
    if lines:
        section.add(
            html.paragraph("These files were missing or could not be read; the sections above leave them out."),
            html.note(lines),
        )
    return section


def _footer(runs: list[Run], command: str | None) -> str:
    rows = []
    for run in runs:
        rows.append(
            [
                run.name,
                clean(run.recipe.get("name", "\u2013"), 60),
                clean(str(run.metrics.get("commit") or "\u2013")[:12]),
                clean(run.metrics.get("seed", run.recipe.get("seed", "\u2013")), 20),
                numbers.duration(run.metrics.get("seconds")),
                str(run.path),
            ]
        )
    header = ["run", "recipe", "commit", "seed", "training time", "folder"]
    if command is None:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    versions = ", ".join(
        f"{name} {_version(name)}" for name in ("fastkd", "torch", "torchvision", "pycocotools", "matplotlib")
    )
    return (
        "<h3>Where this comes from</h3>"
        + html.table(header, rows, text_columns=len(header))
        + f"<p>Command: <code>{escape(command)}</code><br>Report written at commit <code>{escape(_commit())}</code> "
        f"with Python {escape(platform.python_version())}, {escape(versions)} on {escape(platform.machine())} "
        f"{escape(platform.system())}.</p>"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _commit() -> str:
    """The git commit of this file's checkout; "unknown" outside one."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
