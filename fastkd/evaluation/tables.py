"""COCO and CrowdHuman metrics as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastkd.text import printable

KINDS = {"bbox": "boxes", "segm": "masks"}
_SIZE_ROWS = {"s": "small (< 32 x 32 px)", "m": "medium", "l": "large (> 96 x 96 px)"}


def number(value: float | None) -> str:
    """A percentage with one decimal; "-" for None."""
    return "-" if value is None else f"{value:.1f}"


def _table(title: str, first: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def summary_table(metrics: dict[str, dict]) -> Table:
    """One row for boxes, one for masks: AP, AP50, AP75 and the average recall at the largest number of detections."""
    table = _table("COCO metrics, %", "", ["AP", "AP50", "AP75", "AR", "images", "objects"])
    for kind, values in metrics.items():
        cells = [number(values[name]) for name in ("AP", "AP50", "AP75", _last_recall(values))]
        table.add_row(KINDS.get(kind, kind), *cells, str(values["images"]), str(values["instances"]))
    return table


def size_table(metrics: dict[str, dict]) -> Table:
    """AP and AR by the size of the object in the original image; "-" for sizes without objects."""
    kinds = list(metrics)
    table = _table("by object size, %", "size", _columns(kinds, ("AP", "AR")))
    for letter, label in _SIZE_ROWS.items():
        table.add_row(label, *(number(metrics[kind][f"{name}{letter}"]) for kind in kinds for name in ("AP", "AR")))
    return table


def class_table(metrics: dict[str, dict]) -> Table:
    """AP of every class; "-" for classes without objects."""
    kinds = list(metrics)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl") if len(kinds) == 1 else ("AP", "AP50")
    table = _table("by class, %", "class", ["objects", *_columns(kinds, names)])
    for label, values in metrics[kinds[0]]["per_class"].items():
        cells = [number(metrics[kind]["per_class"][label][name]) for kind in kinds for name in names]
        table.add_row(Text(printable(label)), str(values["instances"]), *cells)  # Text: a class may be called "[bold]"
    return table


def crowd_table(metrics: dict[str, dict]) -> Table:
    """One row: AP, MR^-2 (lower is better), JI with its score threshold, and recall."""
    values = metrics["bbox"]
    table = _table("CrowdHuman metrics, %", "", ["AP", "MR^-2", "JI", "at score", "recall", "images", "people"])
    cells = [number(values[name]) for name in ("AP", "MR", "JI", "JI_score", "recall")]
    table.add_row(KINDS["bbox"], *cells, str(values["images"]), str(values["instances"]))
    return table


def print_metrics(metrics: dict[str, dict], console: Console | None = None) -> None:
    """Prints the tables by summary, size and class; for CrowdHuman's metrics a single table."""
    console = console or Console()
    if metrics["bbox"].get("unread"):
        unread, images = metrics["bbox"]["unread"], metrics["bbox"]["images"]
        console.print(f"{unread} of {images} images could not be read; their objects count as missed")
    if "MR" in metrics["bbox"]:
        console.print(crowd_table(metrics))
        return
    for table in (summary_table(metrics), size_table(metrics), class_table(metrics)):
        console.print(table)


def _columns(kinds: list[str], names: tuple[str, ...]) -> list[str]:
    """Column titles; they name boxes and masks only if both are shown."""
    return [name if len(kinds) == 1 else f"{name} {KINDS[kind]}" for kind in kinds for name in names]


def _last_recall(values: dict[str, Any]) -> str:
    return [name for name in values if name[:2] == "AR" and name[2:].isdigit()][-1]
