"""From the timings of `benchmarks.ops` to what is kept: docs/results/ops.json, the tables in ops.md, comparisons."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.ops.limits import LIMITS, rate
from benchmarks.ops.rows import BY_NAME, Targets

MIB = 2**20
VARIANTS = ("bfloat16", "channels-last", "one thread")


def gather(benchmarks: list[dict], arithmetic: str) -> dict[str, Any]:
    """Limits, rows and growth from pytest-benchmark's list.

    Args:
        benchmarks: "benchmarks" of the JSON that pytest-benchmark writes.
        arithmetic: name of the limit that multiply-adds are held against.
    Returns: {"limits": {name: rate}, "rows": {name: {...}}, "growth": {axis: {row: [[x, ms], ..]}}}; times are minima.
    """
    limits, rows, growth = {}, {}, {}
    for entry in benchmarks:
        info, seconds = entry["extra_info"], entry["stats"]["min"]
        if info["kind"] == "limit":
            limits[info["name"]] = rate(info["name"], info["work"], seconds)
        elif info["kind"] == "growth":
            growth.setdefault(info["axis"], {}).setdefault(info["row"], []).append([info["x"], seconds * 1e3])
        else:
            row = rows.setdefault(info["row"], {"shape": info["shape"], "cells": info["cells"], "sides": {}})
            side = info["side"] if info["kind"] == "main" else info["variant"]
            row["sides"][side] = {
                "ms": seconds * 1e3,
                "median_ms": entry["stats"]["median"] * 1e3,
                "rounds": entry["stats"]["rounds"],
                **{key: info.get(key) for key in ("memory", "returned", "work", "backward", "first_call_seconds")},
            }
    for name, row in rows.items():
        row.update(conclusions(row["sides"], BY_NAME[name].targets, limits, arithmetic))
    return {"limits": limits, "rows": rows, "growth": growth}


def conclusions(sides: dict[str, dict], targets: Targets, limits: dict[str, float], arithmetic: str) -> dict[str, Any]:
    """Ratios, share of the limit, memory, and whether each target is met, as far as they were measured."""
    found: dict[str, Any] = {"targets": {}, "met": {}}
    ours = sides.get("ours")
    plain = {side: entry for side, entry in sides.items() if side.startswith("plain: ")}
    if ours is None:
        return found
    if plain:
        form = min(plain, key=lambda side: plain[side]["ms"])
        found |= {"plain_form": form.removeprefix("plain: "), "times_plain": plain[form]["ms"] / ours["ms"]}
        found["plain_extra"], found["plain_scratch"] = memory_of(plain[form])
    if "compiled" in sides:
        found["times_compiled"] = sides["compiled"]["ms"] / ours["ms"]
    for variant in VARIANTS:
        if variant in sides:
            found[f"times_{variant}"] = sides[variant]["ms"] / ours["ms"]
    if "floor" in sides:
        least = sides["floor"]["ms"]
        best = {name: ours["ms"] / least * found[name] for name in ("times_plain", "times_compiled") if name in found}
        found |= {"floor": least, "at_floor": best}
    found["extra"], found["scratch"] = memory_of(ours)
    found |= share(ours, limits, arithmetic)
    judge(found, targets)
    return found


def memory_of(side: dict) -> tuple[int, int]:
    """Extra memory of a call, and how much of it the caller does not get to keep as results and gradients."""
    peak = side["memory"]["peak"]
    return peak, max(peak - side["returned"], 0)


def share(ours: dict, limits: dict[str, float], arithmetic: str) -> dict[str, Any]:
    """How much of the machine's limit the call reaches."""
    work, seconds = ours["work"], ours["ms"] / 1e3
    if work["multiply_adds"] and arithmetic in limits:
        return {"limit": arithmetic, "share": rate(arithmetic, work["multiply_adds"], seconds) / limits[arithmetic]}
    if work["bytes"] and "copy" in limits:
        return {"limit": "copy", "share": rate("copy", work["bytes"], seconds) / limits["copy"]}
    return {}


def judge(found: dict[str, Any], targets: Targets) -> None:
    """Fill found["targets"] and found["met"]."""
    for name, target in (
        ("times_plain", targets.plain),
        ("times_compiled", targets.compiled),
        ("share", targets.share),
    ):
        if target is not None and name in found:
            found["targets"][name], found["met"][name] = target, found[name] >= target
    if targets.memory is None:
        return
    if not targets.of_plain:  # at most what the caller keeps, up to small change
        kept = found["extra"] - found["scratch"]
        found["targets"]["memory"], found["met"]["memory"] = kept, found["scratch"] <= 0.02 * targets.memory * kept
    elif "plain_scratch" in found:
        found["targets"]["memory"] = targets.memory * found["plain_scratch"]
        found["met"]["memory"] = found["scratch"] <= found["targets"]["memory"]


def exponent(points: list[list[float]]) -> float:
    """Slope of log(time) over log(x) by least squares: 1 = linear."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(axis) / len(logs) for axis in zip(*logs))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def _number(value: float | None, form: str, target: float | None = None, met: bool | None = None) -> str:
    if value is None:
        return "-"
    text = form.format(value)
    if target is None:
        return text
    return f"{'**' if met else ''}{text}{'**' if met else ''} ({form.format(target)})"


def main_table(rows: dict[str, dict]) -> list[str]:
    """The table of times, ratios, limits and memory; a target in brackets, bold where it is met."""
    heads = ["op", "ours, ms", "plain", "compiled", "x plain", "x compiled", "share of limit"]
    heads += ["extra MiB", "plain's", "at most"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in rows.items():
        sides, targets, met = row["sides"], row["targets"], row["met"]
        if "ours" not in sides:
            continue

        def judged(key: str, form: str, row=row, targets=targets, met=met) -> str:
            return _number(row.get(key), form, targets.get(key), met.get(key))

        plain = sides.get(f"plain: {row.get('plain_form')}", {}).get("ms")
        kept, allowed = row["extra"] - row["scratch"], targets.get("memory")
        if allowed is not None and BY_NAME[name].targets.of_plain:
            allowed += kept
        verdict = "" if allowed is None else " ok" if met["memory"] else " missed"
        lines.append(
            "| "
            + " | ".join([
                name + ("" if sides["ours"]["backward"] else ", forward only"),
                _number(sides["ours"]["ms"], "{:.2f}"),
                _number(plain, "{:.1f}"),
                _number(sides.get("compiled", {}).get("ms"), "{:.1f}"),
                judged("times_plain", "{:.1f}"),
                judged("times_compiled", "{:.1f}"),
                judged("share", "{:.0%}") + (f" of {row['limit']}" if "limit" in row else ""),
                _number(row["extra"] / MIB, "{:.1f}"),
                _number(row["plain_extra"] / MIB if "plain_extra" in row else None, "{:.1f}"),
                _number(allowed / MIB if allowed is not None else None, "{:.1f}") + verdict,
            ])
            + " |"
        )  # fmt: skip
    return lines


def variant_table(rows: dict[str, dict]) -> list[str]:
    """Our times in other settings, relative to float32, contiguous, all threads."""
    lines = ["| op | bfloat16 is faster by | channels-last takes | two threads are faster by | plain forms, ms |"]
    lines.append("|---|---|---|---|---|")
    for name, row in rows.items():
        bf16 = row.get("times_bfloat16")
        forms = ", ".join(
            f"{side.removeprefix('plain: ')} {entry['ms']:.1f}"
            for side, entry in row["sides"].items()
            if side.startswith("plain: ")
        )
        cells = [
            _number(1 / bf16 if bf16 else None, "{:.2f} x"),
            _number(row.get("times_channels-last"), "{:.2f} x"),
            _number(row.get("times_one thread"), "{:.2f} x"),
            forms or "-",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def growth_table(growth: dict[str, dict]) -> list[str]:
    """Exponents of growth."""
    axes = list(growth)
    lines = ["| op | " + " | ".join(axes) + " |", "|---|" + "---|" * len(axes)]
    for name in dict.fromkeys(row for by_row in growth.values() for row in by_row):
        cells = [f"{exponent(growth[axis][name]):.2f}" if len(growth[axis].get(name, [])) > 1 else "-" for axis in axes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


BEYOND_THE_FLOOR = """\
What the floor does not show: ops-profile.md has the parts of each step. box_paint_conv3x3 has, besides its bytes, the
products of every embedding with nine matrices, forward and twice backward: 54 C^2 operations an embedding and level,
0.25 GFLOP of 14 boxes on five levels, 1.4 ms at 177 GFLOP/s; they are not hidden behind the bytes. instance_norm_mse
grows as its bytes do: in one thread with an exponent of 0.95 where the same bytes, with nothing computed, have 1.05
(1, 2 and 4 images). A floor above the time beside it says how far apart two moments of a shared machine can
be.""".splitlines()


def bounds_table(rows: dict[str, dict]) -> list[str]:
    """What moving the bytes alone takes, and the ratios that a call of that time would reach."""
    lines = ["| op | reads, MiB | writes, MiB | floor, ms | ours / floor | x plain at the floor | x compiled |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        if "floor" not in row:
            continue
        ours, work = row["sides"]["ours"], row["sides"]["floor"]["work"]
        cells = [
            f"{work['read'] / MIB:.1f}",
            f"{work['written'] / MIB:.1f}",
            f"{row['floor']:.2f}",
            f"{ours['ms'] / row['floor']:.1f}",
            *(_bound(row, key) for key in ("times_plain", "times_compiled")),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _bound(row: dict, key: str) -> str:
    text = _number(row["at_floor"].get(key), "{:.1f}", row["targets"].get(key))
    return text + (" out of reach" if out_of_reach(row, key) else "")


def out_of_reach(row: dict, key: str) -> bool:
    """Whether even a call that only moves its bytes would miss this target."""
    best, target = row.get("at_floor", {}).get(key), row["targets"].get(key)
    return best is not None and target is not None and best < target


def missed_table(rows: dict[str, dict], limits: dict[str, float]) -> list[str]:
    """For each ratio that was missed: the time that it asks for, and how fast the machine had to be for that."""
    lines = ["| op | target | asks for, ms | ours, ms | work in that time | of what this run measured |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in rows.items():
        sides, work = row["sides"], row["sides"].get("ours", {}).get("work") or {}
        baselines = {"times_plain": f"plain: {row.get('plain_form')}", "times_compiled": "compiled"}
        for key, peer in baselines.items():
            if row["met"].get(key, True):
                continue
            asked = sides[peer]["ms"] / row["targets"][key]
            title = f"{row['targets'][key]:g} x {peer.split(':')[0]}"
            limit = row.get("limit")
            speed = share = "-"
            if limit:
                needed = rate(limit, work["multiply_adds"] or work["bytes"], asked / 1e3)
                speed, share = f"{needed:.0f} {LIMITS[limit][1]}", f"{needed / limits[limit]:.0%} of {limit}"
            lines.append(f"| {name} | {title} | {asked:.2f} | {sides['ours']['ms']:.2f} | {speed} | {share} |")
    return lines


def limit_line(limits: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f} {LIMITS[name][1]}" for name, value in limits.items())


def report(saved: dict[str, Any]) -> str:
    """The text of ops.md."""
    machine = saved["machine"]
    shape = saved["base_shape"]
    kernels = ", ".join(name for name, there in machine["kernels"].items() if there) or "none"
    missing = ", ".join(name for name, there in machine["kernels"].items() if not there)
    lines = [
        "# The ops: speed and memory",
        "",
        f"Command: `{saved['command']}`, commit {saved['commit']}, seed {saved['seed']}. {machine['cpu']}, "
        f"{machine['cores']} cores, {saved['threads']} threads, device {machine['device']}, capability "
        f"{machine['capability']}, torch {machine['torch']}, float32, contiguous.",
        "",
        f"Compiled kernels: {kernels}." + (f" Plain-torch references: {missing}." if missing else ""),
        "",
        f"B = {shape['images']}, padded image {shape['height']} x {shape['width']}, strides "
        f"{', '.join(map(str, shape['strides']))}, S = {saved['cells']} cells, C = {shape['channels']}, "
        f"G = {shape['heads']}, {shape['boxes']} boxes an image. Forward and backward, minima, results checked against "
        "plain torch before each timing. `plain` is the faster of the obvious forms below, `compiled` torch.compile of "
        "the form with matrix products, warm. Targets in brackets, bold where met.",
        "",
        f"The machine in the same run: {limit_line(saved['limits'])}.",
        "",
        *main_table(saved["rows"]),
        "",
        "Rates of bytes: copy, fill and fresh fill (which allocates what it writes, as an op does its results) move",
        "about as much as a pyramid, which stays in part in the last cache between calls, as what the ops move does;",
        "large copy moves 2 GiB from memory to memory; faulted fill writes memory fresh from the system. Ours and the",
        "baselines run in one process that keeps what it frees, so none of them pays for that "
        f"({', '.join(f'{key}={value}' for key, value in machine['allocator'].items())}).",
        "",
        "Memory: peak of a call over what was there before, results and gradients included. `at most`: what the caller",
        "keeps (results and gradients, and 2 % more) where the target is 'no more than that'; else that plus the",
        "allowed fraction of plain torch's scratch. Share of the limit: bytes that must move at least once, or",
        "multiply-adds without recomputation, a second, against the rate measured above.",
        "",
        *variant_table(saved["rows"]),
    ]
    bounds = bounds_table(saved["rows"])
    if len(bounds) > 2:
        lines += ["", "## What bounds the missed targets", ""]
        lines += ["Floor: what a call must read and write at least (in each pass its inputs once, by the cache lines"]
        lines += [
            "that hold what is needed; results and gradients once), moved by all threads in the same run, nothing"
        ]
        lines += ["computed. A target (in brackets) above the ratio at the floor is out of reach on this machine.", ""]
        lines += bounds
        missed = missed_table(saved["rows"], saved["limits"])
        if len(missed) > 2:
            lines += ["", "What the missed ratios ask for: more than 100 % of what a loop of nothing else reached in"]
            lines += ["the same run is out of reach of any program that does this work.", "", *missed]
        lines += ["", *BEYOND_THE_FLOOR]
    if saved["growth"]:
        lines += ["", "How time grows (exponent of a fit; 1 = linear, less = fixed costs show):", ""]
        lines += [*growth_table(saved["growth"]), "", "![growth](ops-growth.png)"]
    return "\n".join([*lines, "", "![times](ops-times.png)", ""])


def quote(saved: dict[str, Any]) -> str:
    """The lines for the README: the rows with targets, and how they were made."""
    rows = {name: row for name, row in saved["rows"].items() if BY_NAME[name].targets != Targets()}
    lines = ["| op | ours, ms | plain | compiled | times faster than plain | than compiled |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in rows.items():
        sides = row["sides"]
        plain = sides.get(f"plain: {row.get('plain_form')}", {}).get("ms")
        cells = [
            _number(sides["ours"]["ms"], "{:.2f}"),
            _number(plain, "{:.1f}"),
            _number(sides.get("compiled", {}).get("ms"), "{:.1f}"),
            _number(row.get("times_plain"), "**{:.1f}**"),
            _number(row.get("times_compiled"), "{:.1f}"),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    judged = [(met, name, key) for name, row in rows.items() for key, met in row["met"].items()]
    missed = ", ".join(f"{name} ({_missed(rows[name], key)})" for met, name, key in judged if not met)
    machine = saved["machine"]
    lines += [
        "",
        f"Forward + backward, B = {saved['base_shape']['images']}, {saved['base_shape']['height']} x "
        f"{saved['base_shape']['width']}, float32, {saved['threads']} threads of {machine['cpu']}; torch "
        f"{machine['torch']}, commit {saved['commit']}, `make bench`. "
        f"{sum(met for met, *_ in judged)} of {len(judged)} targets met" + (f"; missed: {missed}." if missed else "."),
    ]
    return "\n".join(lines)


def _missed(row: dict, key: str) -> str:
    text = key.replace("times_", "x ")
    return text + (f"; at most {row['at_floor'][key]:.1f} here" if out_of_reach(row, key) else "")


def compare(saved: dict[str, Any], now: dict[str, Any], threshold: float) -> tuple[list[str], bool]:
    """Our times against a saved run's, row by row.

    Args:
        threshold: the largest ratio new / saved that passes.
    Returns: Markdown lines, and whether every row that both have passes.
    Raises: ValueError if the runs have no row in common or differ in shape.
    """
    common = [name for name in now["rows"] if "ours" in saved["rows"].get(name, {}).get("sides", {})]
    if not common:
        raise ValueError("compare: runs must have a row in common, got none; measure the saved run's rows")
    lines = ["| op | saved, ms | now, ms | now / saved | |", "|---|---|---|---|---|"]
    passed = True
    for name in common:
        before, after = saved["rows"][name], now["rows"][name]
        if before["shape"] != after["shape"]:
            raise ValueError(
                f"compare: {name} must have the saved run's shape {before['shape']}, got {after['shape']}; "
                "measure both with or without --quick"
            )
        old, new = before["sides"]["ours"]["ms"], after["sides"]["ours"]["ms"]
        good = new / old <= threshold
        passed &= good
        lines.append(f"| {name} | {old:.3f} | {new:.3f} | {new / old:.2f} | {'' if good else 'SLOWER'} |")
    for name in saved["limits"]:
        if name in now["limits"]:
            old, new = saved["limits"][name], now["limits"][name]
            lines.append(f"| (the machine: {name}) | {old:.1f} {LIMITS[name][1]} | {new:.1f} | {old / new:.2f} | |")
    return lines, passed
