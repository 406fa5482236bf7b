"""Which part of an op's call takes its time, in float32 and bfloat16, beside the bytes that it must move.

Samples the operators of a step (forward and backward) at the shapes of benchmarks.ops by torch's profiler; what the
compiled kernels and the library's products do not account for is autograd, checks and Python. The floor moves what the
step must read and write at least, nothing computed, in turn with the step:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 python -m benchmarks.ops_profile
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.draws import QUICK, Draw, Shape
from benchmarks.limits import floor
from benchmarks.ops import machine
from benchmarks.rows import BY_NAME
from benchmarks.steps import Step

ROWS = [
    "instance_norm_mse",
    "box_pool, 7 boxes",
    "box_pool, 30 boxes",
    "box_pool, 100 boxes",
    "box_paint",
    "box_paint_conv3x3",
    "norm_relu_box_pool",
    "instance_attention, N = 42",
    "attention_mass + value_mimic",
    "value_mimic",
    "masked_mse",
]
OURS, REST = "fastkd::", "autograd, checks, Python"


def owner(event) -> str:
    """The compiled op that an event is a part of, else the operator of torch itself, else REST."""
    name = event.name if event.name.startswith("aten::") else REST
    while event is not None:
        name = event.name if event.name.startswith(OURS) else name
        event = event.cpu_parent
    return name


def parts_of(step: Step, rounds: int) -> dict[str, float]:
    """Operator -> milliseconds of a step in it and not in another one, the least of the rounds."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        once: dict[str, float] = defaultdict(float)
        for event in profiler.events():
            once[owner(event)] += event.self_cpu_time_total / 1e3
        for name, spent in once.items():
            found[name].append(spent)
    return {name: min(times) for name, times in found.items()}


def timed(calls: dict[str, object], rounds: int) -> dict[str, float]:
    """Milliseconds of each call, minima; the calls take turns."""
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: min(spent[1:]) for name, spent in times.items()}


def measure(name: str, dtype: torch.dtype, base: Shape, rounds: int) -> dict[str, float]:
    """Milliseconds of the whole step, of its floor and of its parts, the small ones together."""
    row = BY_NAME[name]
    case = row.build(Draw(base if base is QUICK else row.shape(base), dtype, False, torch.device("cpu")))
    step = Step(case.ours, case.arguments)
    calls = {"whole": step, **({"floor": floor(case.passes, dtype)} if case.passes else {})}
    whole = timed(calls, rounds)
    parts = parts_of(step, rounds)
    small = {part for part, spent in parts.items() if not part.startswith(OURS) and spent < 0.05 * whole["whole"]}
    kept = {part: spent for part, spent in parts.items() if part not in small and part != REST}
    return {**whole, **kept, REST: max(whole["whole"] - sum(kept.values()), 0.0)}


def table(name: str, base: Shape, rounds: int) -> list[str]:
    """Lines of one row: its parts in both dtypes."""
    single, half = (measure(name, dtype, base, rounds) for dtype in (torch.float32, torch.bfloat16))
    order = [*sorted(part for part in {**single, **half} if part not in ("whole", "floor", REST)), REST, "whole"]
    lines = [f"\n## {name}\n", "| part | float32, ms | share | bfloat16, ms | faster by |", "|---|---|---|---|---|"]
    for part in [*order, *(["floor"] if "floor" in single else [])]:
        one, other = single.get(part, 0.0), half.get(part, 0.0)
        title = {"whole": "**whole step**", "floor": "its bytes alone"}.get(part, part.removeprefix(OURS))
        ratio = f"{one / other:.2f} x" if other > 0.02 and one > 0 else "-"
        lines.append(f"| {title} | {one:.2f} | {one / single['whole']:.0%} | {other:.2f} | {ratio} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=ROWS, default=ROWS, help="(default: all)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, help="of each measurement (default: 15)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    about = machine(torch.device("cpu"))
    print(f"{about['cpu']}, {about['capability']}, {chosen.threads} threads, torch {about['torch']}.")
    for name in chosen.rows:
        print("\n".join(table(name, QUICK if chosen.quick else Shape(), chosen.rounds)), flush=True)


if __name__ == "__main__":
    main()
