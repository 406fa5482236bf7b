"""Plots of `benchmarks.ops`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDES = {"plain": "#9aa5b1", "compiled": "#d8743b", "ours": "#3b7dd8"}
AXES = {
    "images": "images in the batch (B)",
    "cells": "cells of an image (S)",
    "boxes": "boxes of an image",
    "queries": "queries of an image (N)",
}


def times(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot milliseconds of every row: plain, compiled, ours."""
    figure, axis = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows.values()):
        sides = {**row["sides"], "plain": row["sides"].get(f"plain: {row.get('plain_form')}")}
        for offset, (side, colour) in enumerate(SIDES.items()):
            if sides.get(side):
                value = sides[side]["ms"]
                axis.barh(place + (offset - 1) * 0.27, value, 0.25, color=colour, label=side if place == 0 else None)
                axis.annotate(f"{value:.3g}", (value, place + (offset - 1) * 0.27), va="center", fontsize=7)
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_xlabel("ms, forward and backward (logarithmic)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def growth(axes: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Plot time over images, cells, boxes and queries on logarithmic axes; grey lines are linear growth."""
    size = (4.6 * len(axes), 5.2)
    figure, grid = plt.subplots(1, len(axes), figsize=size, layout="constrained", squeeze=False)
    names = list(dict.fromkeys(row for rows in axes.values() for row in rows))
    colours = {
        row: plt.get_cmap("tab20")(index % 20) for index, row in enumerate(names)
    }  # the same colour for a row in all panels
    lines = {}
    for axis, (name, rows) in zip(grid[0], axes.items()):
        for row, points in rows.items():
            xs, ys = zip(*sorted(points))
            (lines[row],) = axis.plot(xs, ys, "o-", markersize=3, color=colours[row])
            axis.plot(xs, [ys[-1] * x / xs[-1] for x in xs], color="#cccccc", linewidth=0.7, zorder=0)
        axis.set(xscale="log", yscale="log", xlabel=AXES[name], ylabel="ms")
        measured = sorted({x for points in rows.values() for x, _ in points})
        axis.set_xticks(measured, [f"{x:g}" for x in measured])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
