"""Time of the parts of an op's call in float32 and bfloat16, with the time of its necessary memory traffic.

One thread and processor time, to reduce the influence of other programs; the shapes of benchmarks.ops. Forward,
backward and the floor (the necessary reads and writes, without computation) are timed alternately. If a step consists
of several operators, torch's profiler gives the time of each:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 python -m benchmarks.ops.profile
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.environment import machine
from benchmarks.ops.draws import QUICK, Draw, Shape
from benchmarks.ops.limits import floor
from benchmarks.ops.rows import BY_NAME
from benchmarks.step.steps import Step, tensors

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
OURS, OTHERS = "fastkd::", "autograd, checks, Python"


def halves(step: Step) -> dict[str, float]:
    """Processor time of a step's forward and backward pass, milliseconds."""
    begin = time.process_time()
    results = tensors(step.function(*step.arguments))
    middle = time.process_time()
    roots = [result for result in results if result.requires_grad]
    gradients = torch.autograd.grad(roots, step.wanted, step.cotangents)
    end = time.process_time()
    del gradients
    return {"forward": (middle - begin) * 1e3, "backward": (end - middle) * 1e3}


def owner(event) -> str:
    """The compiled op that contains an event, else the torch operator, else OTHERS."""
    name = event.name if event.name.startswith("aten::") else OTHERS
    while event is not None:
        name = event.name if event.name.startswith(OURS) else name
        event = event.cpu_parent
    return name


def operators(step: Step) -> dict[str, float]:
    """Operator -> milliseconds (wall time) of a step, excluding nested operators."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        found[owner(event)] += event.self_cpu_time_total / 1e3
    return found


def least(measurements: list[dict[str, float]]) -> dict[str, float]:
    """The smallest of each entry."""
    names = dict.fromkeys(name for one in measurements for name in one)
    return {name: min(one[name] for one in measurements if name in one) for name in names}


def measure(name: str, dtype: torch.dtype, base: Shape, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of the passes and the floor, and of operators with at least 2 % of them."""
    row = BY_NAME[name]
    case = row.build(Draw(base if base is QUICK else row.shape(base), dtype, False, torch.device("cpu")))
    step = Step(case.ours, case.arguments)
    move = floor(case.passes, dtype) if case.passes else None
    passes = []
    for _ in range(rounds + 1):
        passes.append(halves(step))
        if move is not None:
            begin = time.process_time()
            move()
            passes[-1]["floor"] = (time.process_time() - begin) * 1e3
    found = least(passes[1:])
    parts = least([operators(step) for _ in range(rounds)])
    found["whole"] = found["forward"] + found["backward"]
    return found, {part: spent for part, spent in parts.items() if spent >= 0.02 * found["whole"]}


def table(name: str, base: Shape, rounds: int) -> list[str]:
    """Lines of one row: its parts in both dtypes."""
    (single, single_parts), (half, half_parts) = (
        measure(name, dtype, base, rounds) for dtype in (torch.float32, torch.bfloat16)
    )
    lines = [f"\n## {name}\n", "| part | float32, ms | share | bfloat16, ms | faster by |", "|---|---|---|---|---|"]
    titles = {"forward": "forward", "backward": "backward", "whole": "**whole step**", "floor": "its bytes alone"}
    rows = [(title, single.get(key), half.get(key)) for key, title in titles.items()]
    kernels = sorted({**single_parts, **half_parts})
    if sum(part.startswith(OURS) for part in kernels) > 2 or any(part.startswith("aten::") for part in kernels):
        rows += [(f"of it {part.removeprefix(OURS)}", single_parts.get(part), half_parts.get(part)) for part in kernels]
    for title, one, other in rows:
        if one is None and other is None:
            continue
        ratio = f"{one / other:.2f} x" if one and other else "-"
        first, second = (("-" if value is None else f"{value:.2f}") for value in (one, other))
        share = "-" if one is None else f"{one / single['whole']:.0%}"
        lines.append(f"| {title} | {first} | {share} | {second} | {ratio} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=ROWS, default=ROWS, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="of each measurement (default: 15)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = machine(torch.device("cpu"))
    print(f"{about['cpu']}, {about['capability']}, one thread, torch {about['torch']}.")
    for name in chosen.rows:
        print("\n".join(table(name, QUICK if chosen.quick else Shape(), chosen.rounds)), flush=True)


if __name__ == "__main__":
    main()
