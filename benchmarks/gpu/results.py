"""Writes docs/results/gpu.md from the output of `make gpu-check`: `python -m benchmarks.gpu.results OUT/gpu.json`.

Measured times are shown beside PREDICTED ones (benchmarks/gpu/roofline.py). Stages that failed or timed out are listed
as such, with all their records.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.roofline import KNOWN, MODELS, Card
from benchmarks.gpu.stages import failures
from benchmarks.ops.draws import Shape
from benchmarks.ops.rows import BY_NAME

OUT = Path("docs/results/gpu.md")
CHECKS = ("windows", "tests", "sanitizer")


def _result(saved: dict[str, Any], stage: str) -> dict[str, Any]:
    return saved["stages"].get(stage, {}).get("result") or {}


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _time(side: dict[str, Any]) -> float | None:
    """Milliseconds of a replayed CUDA graph if measured, else wall time."""
    return side.get("graph_ms", side.get("wall_ms"))


def stage_rows(saved: dict[str, Any]) -> str:
    """One row per stage."""
    rows = []
    for name, entry in saved["stages"].items():
        wrong = failures(entry["result"] or {})
        rows.append([name, entry["status"], f"{entry['seconds']:.0f}", ", ".join(wrong) or "none"])
    return _table(["stage", "status", "seconds", "entries with errors"], rows)


def check_lines(saved: dict[str, Any]) -> list[str]:
    """Results of the correctness checks, each error with its reason."""
    windows, tests, sanitizer = (_result(saved, name) for name in CHECKS)
    good = sum(value == "ok" for value in windows.values())
    lines = [f"- Calls at the limits of a launch: {good} of {len(windows)} agree with the reference."]
    lines += [f"  - {name}: {windows[name]['error']}" for name in failures(windows)]
    if "outcomes" in tests:
        counted = ", ".join(f"{count} {name.lower()}" for name, count in tests["outcomes"].items() if count)
        lines.append(f"- tests/ops/test_gpu.py, ten calls of each op: {counted or 'nothing ran'}.")
        lines += [f"  - failed: {name}" for name in tests["failed"]]
    for name, value in sanitizer.items():
        told = value if isinstance(value, str) else value.get("summary") or f"exit status {value['code']}"
        lines.append(f"- compute-sanitizer, {name}: {told}")
    return lines


def op_rows(saved: dict[str, Any], card: Card | None) -> str:
    """One row per op: measured times, the PREDICTED time, ratios."""
    heads = ["op", "ours, ms", "PREDICTED, ms", "achieved", "plain, ms", "compiled plain, ms", "faster than plain"]
    heads += ["than compiled", "ours with the host, ms", "remark"]
    rows = []
    for name, entry in _result(saved, "ops").items():
        if name not in BY_NAME:
            continue
        if "sides" not in entry:
            rows.append([name, *[""] * 8, entry["error"]])
            continue
        sides, model = entry["sides"], MODELS.get(BY_NAME[name].build.__name__)
        ours = _time(sides.get("ours", {}))
        plain = min(filter(None, (_time(side) for key, side in sides.items() if key.startswith("plain"))), default=None)
        compiled = _time(sides.get("compiled", {}))
        predicted = None
        if model is not None and card is not None:
            shape = Shape(**{key: tuple(v) if isinstance(v, list) else v for key, v in entry["shape"].items()})
            predicted = 1e3 * model(shape, 2).seconds(card, True)
        ratios = ["" if ours is None or other is None else f"{other / ours:.1f} x" for other in (plain, compiled)]
        achieved = "" if ours is None or predicted is None else f"{predicted / ours:.0%}"
        remarks = [entry["differs"]] if "differs" in entry else []
        remarks += [f"{key}: {side['failed']}" for key, side in sides.items() if "failed" in side]
        remarks += [f"{key}: out of memory" for key, side in sides.items() if "out_of_memory" in side]
        wall = _number(sides.get("ours", {}).get("wall_ms"))
        cells = [name, _number(ours), _number(predicted), achieved, _number(plain), _number(compiled), *ratios, wall]
        rows.append([*cells, "; ".join(remarks).replace("|", "/").replace("\n", " ")])
    return _table(heads, rows)


def rate_lines(saved: dict[str, Any]) -> list[str]:
    """Measured peak rates of the card."""
    found = _result(saved, "ops")
    lines = [f"- copy: {found['copy']['gb_per_s']:.0f} GB/s, read and written"] if "copy" in found else []
    for name, value in found.items():
        if isinstance(value, dict) and "tflop_per_s" in value:
            lines.append(f"- {name}: {value['tflop_per_s']:.1f} TFLOP/s")
    return lines


def timed_rows(found: dict[str, Any]) -> str:
    """One row per call of "parts" or "steps"."""
    rows = []
    for name, value in found.items():
        if "error" in value:
            rows.append([name, "", "", "", value["error"].replace("|", "/").replace("\n", " ")])
        elif "wall_ms" in value:
            peak = value.get("peak_bytes")
            memory = "" if peak is None else f"{peak / 2**30:.2f}"
            rows.append([name, f"{value['wall_ms']:.2f}", _number(value.get("images_per_s"), 1), memory, ""])
    return _table(["call", "ms", "images a second", "peak memory of a call, GiB", "error"], rows)


def scene_rows(saved: dict[str, Any]) -> str:
    """One row per method."""
    rows = []
    for name, value in _result(saved, "scenes").items():
        if "held_out_loss" in value:
            losses = " -> ".join(f"{loss:.3f}" for loss in value["held_out_loss"])
            rows.append([name, f"{value['steps']} of {value['of']}", f"{value['steps_per_s']:.1f}", losses])
        elif "error" in value:
            rows.append([name, "", "", value["error"].replace("|", "/").replace("\n", " ")])
    return _table(["method", "steps", "steps a second", "detector's loss on pictures kept apart"], rows)


def card_of(name: str) -> Card | None:
    """The data sheet of a device; None if unknown."""
    return next((card for card in KNOWN if card.name in name), None)


def page(saved: dict[str, Any]) -> str:
    """The Markdown."""
    versions = _result(saved, "versions")
    name = versions.get("card", {}).get("name", "no GPU: a rehearsal on the CPU" if saved["device"] == "cpu" else "?")
    card = card_of(name)
    packages = ", ".join(f"{key} {value}" for key, value in versions.get("packages", {}).items() if value)
    sheet = f"PREDICTED times are bounds from the {card.source}." if card else f"No data sheet of {name}: no PREDICTED."
    toy = " **Toy sizes: a rehearsal, no measurement.**" if saved["toy"] else ""
    kinds = [value for value in (_result(saved, "ops").get("instance_norm_mse") or {}).get("shape", {}).items()]
    shape = ", ".join(f"{key} {value}" for key, value in kinds)
    parts = [
        f"# Measured on {name}",
        f"Written by `python -m benchmarks.gpu.results` from `make gpu-check` at commit {versions.get('commit', '?')}: "
        f"{saved.get('seconds', 0) / 60:.1f} minutes.{toy}\n{packages}. {sheet}",
        "## Stages",
        stage_rows(saved),
        "## Correctness",
        "\n".join(check_lines(saved)),
        "## The card",
        "\n".join(rate_lines(saved)),
        "## Ops",
        "bfloat16, channels-last, forward and backward; replayed from a CUDA graph where the call allows it (a form "
        f"that waits for the device does not), else by the wall clock. {shape}.",
        op_rows(saved, card),
        "## The methods' parts, forward and backward on given pyramids",
        timed_rows(_result(saved, "parts")),
        "## Whole training steps of RetinaNet-R50",
        timed_rows(_result(saved, "steps")),
        "## Scenes",
        scene_rows(saved),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="gpu.json of make gpu-check")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT}")
    chosen = parser.parse_args(arguments)
    saved = json.loads(chosen.file.read_text(encoding="utf-8"))
    if saved["toy"] and chosen.out == OUT:
        raise SystemExit(f"results: {chosen.file} is a rehearsal at toy sizes; give --out to see its page")
    chosen.out.write_text(page(saved), encoding="utf-8")


if __name__ == "__main__":
    main()
