"""Fault campaign: python -m benchmarks.faults [PART ...] [--kills 1000] [--kills-of-two 200] [--minutes 14].

Kills, full and read-only disks, a clock that jumps, damaged checkpoints, changing data, dead workers and a swapped
teacher, each followed by a resumed run whose weights, optimiser states, log and detections must be bit-equal to those
of an undisturbed run. Figures go to docs/results/faults.json after every case, tables to faults.md at the end; the same
command goes on where the last one stopped, and a part that is named is made again. Needs Linux, and root for the parts
`full-disk` and `read-only`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # loaded here, so that forked runs need not

from benchmarks.environment import ROOT, commit, cpu_name
from benchmarks.faults import changes, kills, storage, tiny
from benchmarks.faults.table import page
from fastkd.files import write_json, write_text
from fastkd.training import Recipe

RESULTS = ROOT / "docs/results"
PARTS: dict[str, Callable[[Path, Recipe, int], Iterator[dict[str, Any]]]] = {
    "full-disk": storage.full_disk,
    "read-only": storage.read_only,
    "clock": storage.clock,
    "checkpoints": storage.checkpoints,
    "images": changes.images,
    "annotations": changes.annotations,
    "worker": changes.dead_worker,
    "teacher": changes.teacher,
}


def main() -> int:
    """Run the parts asked for; returns 1 if any fault was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(['kills', 'two', *PARTS])}")
    parser.add_argument("--kills", type=int, default=1000, help="kills of a run in one process, in all")
    parser.add_argument("--kills-of-two", type=int, default=200, help="kills of one of two processes, in all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after the case then in progress")
    parser.add_argument("--seed", type=int, default=0, help="of the parts that draw cases")
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - {"kills", "two", *PARTS})
    if unknown:
        parser.error(f"PART must be one of kills, two, {', '.join(PARTS)}, got {unknown}")
    torch.set_num_threads(1)  # a process with threads must not fork
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    figures = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    end = time.monotonic() + 60 * options.minutes
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a shared disk's fsync takes longer than a step
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory) as folder:
        data = tiny.make_data(Path(folder) / "data")
        tiny.run(tiny.recipe(data, workers=0), Path(folder) / "warm")  # what the first run loads, forked ones have
        for name in options.parts or ["kills", "two", *PARTS]:
            done = figures.get(name, {}).get("complete") and name not in options.parts
            if not done and time.monotonic() < end:
                run_part(name, Path(folder), data, figures, options, end)
    write_text(options.out.with_suffix(".md"), page(figures))
    left = [name for name in ("kills", "two", *PARTS) if not figures.get(name, {}).get("complete")]
    print(f"not complete: {', '.join(left)}; the same command goes on" if left else "complete")
    return int(any(figures[name].get("problems") for name in figures))


def run_part(
    name: str, folder: Path, data: Path, figures: dict[str, Any], options: argparse.Namespace, end: float
) -> None:
    """Runs one part until it is complete or the time is over, and stores its figures after every case."""
    own = figures.get(name, {})
    begin, before, revision = time.monotonic(), own.get("seconds", 0.0), commit()
    work = folder / name
    work.mkdir()
    if name in ("kills", "two"):
        wanted = tiny.recipe(data) if name == "kills" else tiny.recipe(data, batch_size=4)
        campaign, target = (
            (kills.one_process, options.kills) if name == "kills" else (kills.one_of_two, options.kills_of_two)
        )
        trials = campaign(work, wanted, own.get("next_seed", 0))
        while own.get("kills", 0) < target and time.monotonic() < end:
            kills.add(own, next(trials))
            own.update(complete=own["kills"] >= target, seconds=before + time.monotonic() - begin)
            own.update(commit=revision, machine=cpu_name())
            figures[name] = own
            write_json(options.out, figures)
        print(f"{name}: {own.get('kills', 0)} of {target} kills, {len(own.get('problems', []))} problems", flush=True)
        return
    cases = []
    wanted = tiny.recipe(data)
    for case in PARTS[name](work, wanted, options.seed):
        case = {key: str(value).replace(str(folder), "") for key, value in case.items()}
        cases.append(case)
        if case["problem"]:
            print(f"{name}: {case['fault']}: {case['problem']}", flush=True)
    problems = [case for case in cases if case["problem"]]
    print(f"{name}: {len(cases)} cases, {len(problems)} problems", flush=True)
    own = {"cases": len(cases), "problems": problems, "examples": examples(cases), "complete": True}
    figures[name] = own | {"run": wanted.name, "seconds": time.monotonic() - begin}
    figures[name] |= {"commit": revision, "machine": cpu_name()}
    write_json(options.out, figures)


def examples(cases: list[dict[str, str]]) -> list[dict[str, str]]:
    """One case for each kind of fault; kinds differ in more than a number."""
    kinds: dict[str, dict[str, str]] = {}
    for case in cases:
        kinds.setdefault(re.sub(r"\d+", "", case["fault"]), case)
    return [{"fault": case["fault"], "said": case["said"]} for case in kinds.values()][:40]


if __name__ == "__main__":
    sys.exit(main())
