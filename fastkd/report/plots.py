"""Plots of AP, training curves, cost and kinds of mistakes. Each function returns the bytes of one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from PIL import Image

from fastkd.report.html import clean

# Distinguishable on white, also with the common kinds of colour blindness.
RUN_COLOURS = (
    "#5b6475",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#8c6d00",
    "#56b4e9",
    "#7b4fb5",
    "#9b2226",
    "#4d7c0f",
)
ERROR_COLOURS = {
    "wrong class": "#cc79a7",
    "poor localisation": "#e69f00",
    "duplicate": "#56b4e9",
    "background": "#5b6475",
}
INK, SOFT, LINE = "#1a1f2b", "#5b6475", "#dfe3ea"
FONT = 10.0


def run_colour(index: int) -> str:
    """The colour of the run with this index, the same in all plots and tables of a report."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def ap_bars(names: list[str], values: list[float | None], colours: list[str], axis_label: str = "AP") -> bytes:
    """One horizontal bar per run. Args: values: AP in percent, None where unknown."""
    figure, (axes,) = _figure(9.0, 0.55 + 0.42 * len(names))
    rows = np.arange(len(names))
    axes.barh(rows, [value or 0.0 for value in values], color=colours, height=0.66)
    top = max([value for value in values if value is not None] + [1.0])
    for row, value in zip(rows, values):
        axes.text(
            (value or 0.0) + 0.01 * top,
            row,
            "not known" if value is None else f"{value:.1f}",
            va="center",
            fontsize=FONT,
        )
    _name_rows(axes, names)
    axes.set_xlim(0, top * 1.1)
    axes.set_xlabel(axis_label)
    axes.grid(axis="y", visible=False)
    return _png(figure)


def grouped_bars(groups: list[str], names: list[str], values: np.ndarray, colours: list[str], axis_label: str) -> bytes:
    """Grouped bars: for each group one bar per run. Args: values: [runs, groups], NaN where unknown."""
    width = min(11.0, max(6.0, 1.2 + 0.2 * len(groups) * (len(names) + 1.2)))
    figure, (axes,) = _figure(width, 3.5)
    step = 0.82 / max(1, len(names))
    for row, (name, colour) in enumerate(zip(names, colours)):
        offset = (row - (len(names) - 1) / 2) * step
        axes.bar(
            np.arange(len(groups)) + offset, np.nan_to_num(values[row]), step * 0.92, color=colour, label=_label(name)
        )
    axes.set_xticks(np.arange(len(groups)))
    long = max((len(clean(group, 22)) for group in groups), default=0) * len(groups) > 95
    axes.set_xticklabels(
        [clean(group, 22) for group in groups], rotation=35 if long else 0, ha="right" if long else "center"
    )
    _plain_text(axes)
    axes.set_ylim(0, max(1.0, 1.04 * float(np.nan_to_num(values).max(initial=0.0))))
    axes.set_ylabel(axis_label)
    axes.grid(axis="x", visible=False)
    _legend(axes, len(names), above=True)
    return _png(figure)


def curves(panels: list[tuple[str, list[tuple[str, str, np.ndarray, np.ndarray]]]], log_scale=()) -> bytes:
    """Line plots over the training step, two panels per row.

    Args:
        panels: (title, lines) of each panel; a line is (run name, colour, steps, values).
        log_scale: titles of the panels with a logarithmic axis.
    """
    rows = (len(panels) + 1) // 2
    figure, axes_list = _figure(11.0, 2.7 * rows + 0.4, rows, 2 if len(panels) > 1 else 1)
    for axes in axes_list[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes, (title, lines) in zip(axes_list, panels):
        for name, colour, steps, values in lines:
            few = len(steps) <= 12
            (line,) = axes.plot(
                steps, values, color=colour, linewidth=1.5, marker="o" if few else None, markersize=3.5, alpha=0.9
            )
            handles.setdefault(_label(name), line)
        axes.set_title(clean(title, 44), loc="left", fontsize=FONT + 0.5, fontweight="bold", parse_math=False)
        if title in log_scale:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_formatter(ScalarFormatter(useMathText=False))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axes in axes_list[max(0, len(panels) - 2) : len(panels)]:
        axes.set_xlabel("step")
    legend = figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=min(5, max(1, len(handles))),
        frameon=False,
        fontsize=FONT,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _png(figure)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` values, with a shorter window at the ends; same length as `values`."""
    if window <= 1 or len(values) < 3:
        return values
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def cost_bars(
    names: list[str],
    alone: list[float],
    extra: list[float],
    teacher: Sequence[float | None],
    unit: str,
    intervals: Sequence[tuple[float, float] | None] = (),
) -> bytes:
    """Stacked bars: the student alone, the extra cost of the method, and the teacher's training if it is included.

    Args:
        intervals: confidence interval of each extra cost, drawn as a line; None where unknown.
    """
    figure, (axes,) = _figure(9.0, 1.25 + 0.45 * len(names))
    rows = np.arange(len(names))
    axes.barh(rows, alone, color="#9aa7b8", height=0.6, label="student alone")
    axes.barh(rows, np.maximum(extra, 0), left=alone, color="#0072b2", height=0.6, label="extra of the method")
    for row, start, pair in zip(rows, alone, intervals):
        if pair is not None and pair[1] > pair[0]:
            axes.plot([start + pair[0], start + pair[1]], [row, row], color=INK, linewidth=1.5, marker="|")
    ends = np.add(alone, np.maximum(extra, 0))
    shares = np.array([value or 0.0 for value in teacher])
    if shares.any():
        axes.barh(
            rows,
            shares,
            left=ends,
            color="#e69f00",
            height=0.6,
            hatch="///",
            edgecolor="white",
            label="the teacher's own training",
        )
    ends = ends + shares
    for row, end, plain in zip(rows, ends, alone):
        axes.text(
            end + 0.01 * ends.max(),
            row,
            f"x {end / plain:.2f}" if plain > 0 and end > plain else "",
            va="center",
            fontsize=FONT,
        )
    _name_rows(axes, names)
    axes.set_xlim(0, max(ends.max() * 1.12, 1e-9))
    axes.set_xlabel(unit)
    axes.grid(axis="y", visible=False)
    _legend(axes, 3, above=True)
    return _png(figure)


def error_bars(names: list[str], counts: dict[str, list[float]], axis_label: str) -> bytes:
    """Stacked horizontal bars of the kinds of false positives. Args: counts: {kind: one number per run}."""
    figure, (axes,) = _figure(9.0, 1.25 + 0.42 * len(names))
    rows, left = np.arange(len(names)), np.zeros(len(names))
    for kind, values in counts.items():
        axes.barh(rows, values, left=left, color=ERROR_COLOURS[kind], height=0.62, label=kind)
        for row, (start, value) in enumerate(zip(left, values)):
            if value > 0.06 * max(1e-9, max(map(sum, zip(*counts.values())))):
                axes.text(
                    start + value / 2,
                    row,
                    f"{value:.2f}",
                    va="center",
                    ha="center",
                    color="white" if kind == "background" else INK,
                    fontsize=FONT - 1.5,
                )
        left = left + np.array(values)
    _name_rows(axes, names)
    axes.set_xlabel(axis_label)
    axes.grid(axis="y", visible=False)
    _legend(axes, len(counts), above=True)
    return _png(figure)


def feature_grid(
    columns: list[str],
    rows: list[str],
    maps: list[list[np.ndarray]],
    cells: list[tuple[float, float]],
    scale_groups: list[list[int]],
    boxes=(),
) -> bytes:
    """Feature maps scaled to the area of the image, one row per level; maps of a row and group share a colour scale.

    Args:
        maps: each row is the image, uint8 [H, W, 3], followed by 2-D arrays.
        cells: (height, width) of one cell in pixels of the image, for each row.
        scale_groups: lists of column numbers that share a colour scale.
        boxes: xyxy in pixels of the image, drawn on every map.
    """
    height, width = maps[0][0].shape[:2]
    tile = 2.3 * float(np.clip(height / width, 0.5, 1.6))
    size = 2.3 * len(columns) + 0.4, (tile + 0.32) * len(rows) + 0.3
    figure, axes_list = _figure(*size, len(rows), len(columns), constrained_pad=0.03)
    grid = np.array(axes_list, dtype=object).reshape(len(rows), len(columns))
    for r, row in enumerate(maps):
        for c, values in enumerate(row):
            axes = grid[r, c]
            axes.grid(visible=False)
            if c == 0:
                axes.imshow(values, extent=(0, width, height, 0), interpolation="lanczos")
            else:
                group = next(group for group in scale_groups if c in group)
                low, high = min(row[i].min() for i in group), max(row[i].max() for i in group)
                extent = (0, values.shape[1] * cells[r][1], values.shape[0] * cells[r][0], 0)
                axes.imshow(values, cmap="viridis", vmin=low, vmax=max(high, low + 1e-12), extent=extent)
                axes.set_xlabel(f"{low:.2f} \u2026 {high:.2f}", fontsize=FONT - 2.5, color=SOFT, labelpad=2)
            for x1, y1, x2, y2 in boxes:
                axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=1.1))
            axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0), aspect="equal")
            if r == 0:
                axes.set_title(columns[c], fontsize=FONT)
            if c == 0:
                axes.set_ylabel(rows[r], fontsize=FONT)
    return _png(figure, colours=256)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, constrained_pad: float = 0.06):
    layout = ConstrainedLayoutEngine(w_pad=constrained_pad, h_pad=constrained_pad)
    figure = Figure(figsize=(width, height), dpi=110, layout=layout, facecolor="white")
    axes_list = [figure.add_subplot(rows, columns, index + 1) for index in range(rows * columns)]
    for axes in axes_list:
        axes.set_axisbelow(True)
        axes.grid(color=LINE, linewidth=0.8)
        axes.tick_params(colors=SOFT, labelsize=FONT - 0.5, length=0)
        axes.xaxis.label.set(color=SOFT, fontsize=FONT)
        axes.yaxis.label.set(color=SOFT, fontsize=FONT)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(LINE)
    return figure, axes_list


def _name_rows(axes, names: list[str]) -> None:
    axes.set_yticks(np.arange(len(names)))
    axes.set_yticklabels([clean(name, 34) for name in names], color=INK)
    axes.invert_yaxis()
    _plain_text(axes)


def _plain_text(axes) -> None:
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        text.set_parse_math(False)


def _label(name: str) -> str:
    # matplotlib drops legend entries that start with an underscore
    return clean(name, 30).lstrip("_") or "run"


def _legend(axes, entries: int, above: bool) -> None:
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0)} if above else {"loc": "best"}
    legend = axes.legend(ncols=min(4, max(1, entries)), frameon=False, fontsize=FONT - 0.5, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _png(figure: Figure, colours: int = 128) -> bytes:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return encode_png(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]), colours)


def encode_png(image: Image.Image, colours: int = 256) -> bytes:
    """A PNG with a palette of at most `colours` colours, a third of the size of an RGB one."""
    if image.mode != "P":
        large = image.width * image.height > 500_000  # for which the better method takes seconds
        method = Image.Quantize.FASTOCTREE if large else Image.Quantize.MEDIANCUT
        image = image.convert("RGB").quantize(colours, method=method, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
