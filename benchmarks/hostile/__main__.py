"""Hostile files: python -m benchmarks.hostile [READER ...] [--cases 10000] [--minutes 14].

Mutated files for each reader of untrusted files, drawn by a grammar of its format and reproducible by reader and
number. A case is right if the file is read, or refused by a ValueError or OSError that names it; no code may run, no
file outside of the data folder may be opened, and time and memory are limited (benchmarks/hostile/sandbox.py). Figures
go to docs/results/hostile.json and hostile.md; the same command goes on where the last one stopped. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, commit
from benchmarks.hostile.readers import PICTURE, READERS, Reader
from benchmarks.hostile.sandbox import SECONDS, run
from fastkd.files import write_json, write_text

RESULTS = ROOT / "docs/results"
PORTION = 500
KEPT = 20  # wrong cases listed for each reader


def main() -> int:
    """Run the cases that are missing; returns 1 if any was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(reader.name for reader in READERS))
    parser.add_argument("--cases", type=int, default=10_000, help="of each reader, in all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after the portion then in progress")
    parser.add_argument("--out", type=Path, default=RESULTS / "hostile.json")
    options = parser.parse_args()
    unknown = sorted(set(options.readers) - {reader.name for reader in READERS})
    if unknown:
        parser.error(f"READER must be one of {', '.join(reader.name for reader in READERS)}, got {unknown}")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    figures = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    end = time.monotonic() + 60 * options.minutes
    for reader in READERS:
        own = figures.setdefault(reader.name, empty())
        while reader.name in (options.readers or [r.name for r in READERS]) and own["cases"] < options.cases:
            if time.monotonic() > end:
                break
            numbers = range(own["cases"], min(own["cases"] + PORTION, options.cases))
            with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
                for number, outcome in run(reader, numbers, Path(folder) / "data"):
                    add(own, number, outcome, folder)
            own["commit"] = commit()
            write_json(options.out, figures)
        print(f"{reader.name}: {own['cases']} of {options.cases}, {own['wrong']} wrong", flush=True)
        for item in own["problems"]:
            print(f"  case {item['case']}: {item['said']}")
    write_text(options.out.with_suffix(".md"), page(figures))
    return int(any(own["wrong"] for own in figures.values()))


def empty() -> dict[str, Any]:
    """The figures of a reader before its first case."""
    counts = dict.fromkeys(("cases", "read", "refused", "wrong"), 0)
    return counts | {"problems": [], "slowest": 0.0, "largest": 0.0, "seconds": 0.0}


def add(own: dict[str, Any], number: int, outcome: dict[str, Any], folder: str) -> None:
    """Adds a case to the figures of its reader."""
    own["cases"] = number + 1
    own[outcome["kind"]] += 1
    own["slowest"] = max(own["slowest"], outcome["seconds"])
    own["largest"] = max(own["largest"], outcome["megabytes"])
    own["seconds"] += outcome["seconds"]
    if outcome["kind"] == "wrong" and len(own["problems"]) < KEPT:
        own["problems"].append({"case": number, "said": outcome["said"].replace(folder, "")})


def page(figures: dict[str, Any]) -> str:
    """The page of the figures."""
    rows = []
    for reader in READERS:
        own = figures.get(reader.name)
        if own and own["cases"]:
            counts = " | ".join(f"{own[key]:,}" for key in ("cases", "read", "refused", "wrong"))
            rows.append(
                f"| {reader.name} | {reader.what} | {counts} | {own['slowest']:.2f} s | {own['largest']:.0f} MB | "
                f"{own['commit']} |\n"
            )
    return (
        "# Hostile files\n\n`python -m benchmarks.hostile` (figures in hostile.json; the same command "
        "goes on with what is missing; a case is reproduced by reader and number). Each file is mutated by a grammar "
        "of its format: values, types, structure, text and encoding of JSON, 100,000 levels of nesting, numbers of "
        "10,000 digits, control characters, paths out of the folder; chunks and segments of pictures with right "
        "checksums, decompression bombs; headers and offsets of safetensors; instructions of pickles, with code; "
        "members of zips.\n\n"
        "*read*: the file was accepted and what it holds was used. *refused*: a ValueError or OSError that names the "
        "file. *wrong*: anything else, code that ran, a file outside of the folder that was opened, more than "
        f"{SECONDS:g} s or {Reader.megabytes} MB ({PICTURE} MB for pictures, of up to 100 million pixels). "
        "Time and memory are the largest of a case.\n\n"
        "| reader | what is called | cases | read | refused | wrong | time | memory | commit |\n"
        "|---|---|--:|--:|--:|--:|--:|--:|---|\n" + "".join(rows) + _listed(figures)
    )


def _listed(figures: dict[str, Any]) -> str:
    """The wrong cases, in a list."""
    lines = [f"- {name}, case {p['case']}: {p['said']:.120}" for name, own in figures.items() for p in own["problems"]]
    return "\nWrong:\n\n" + "\n".join(lines) + "\n" if lines else ""


if __name__ == "__main__":
    sys.exit(main())
