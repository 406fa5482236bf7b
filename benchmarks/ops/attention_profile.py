"""Time profile of instance_attention: its products on cached tiles, relative to the machine's peak multiply-add rate.

Compiles attention_profile.cpp, the products of one tile in the shapes that csrc/ multiplies them in, and times the op
at the shapes of benchmarks.ops; the remaining time is loads, softmax, biases and stores. One thread:

    python -m benchmarks.ops.attention_profile
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.ops.draws import Draw, Shape
from benchmarks.ops.limits import LIMITS, rate
from benchmarks.ops.rows import BY_NAME
from benchmarks.step.steps import Step

ROOT = Path(__file__).resolve().parents[2]
CAPABILITY = {"AVX512": 2, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 0)  # csrc/common/capability.h


def hot_products(queries: int) -> dict[str, tuple[float, float]]:
    """name -> (multiply-adds per cell, GFLOP/s) of each product of a tile for `queries` queries, fastest of nine."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "products"
        flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi"]
        flags.append(f"-DFASTKD_CAPABILITY={CAPABILITY}")
        include = [f"-I{ROOT / 'csrc'}", f"-isystem{Path(torch.__file__).parent / 'include'}"]
        source = str(Path(__file__).with_suffix(".cpp"))
        subprocess.run([os.environ.get("CXX", "c++"), *flags, *include, source, "-o", str(program)], check=True)
        lines = subprocess.run([program, str(queries)], check=True, capture_output=True, text=True).stdout.splitlines()
    rows = (line.rsplit(maxsplit=2) for line in lines)
    return {name: (float(work), float(speed)) for name, work, speed in rows}


def fastest(call, rounds: int) -> float:
    """Minimum processor time in seconds."""
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


def profile(queries: int, rounds: int = 5) -> str:
    """Lines of the table for `queries` queries."""
    row = BY_NAME[f"instance_attention, N = {queries}"]
    shape = row.shape(Shape())
    case = row.build(Draw(shape, torch.float32, False, torch.device("cpu")))
    call, work = LIMITS["multiply-adds"][0](False, torch.device("cpu"))
    products = hot_products(queries)
    seconds = fastest(Step(case.ours, case.arguments), rounds)
    peak = rate("multiply-adds", work, fastest(call, 9))
    lines = [f"\nN = {queries}: {seconds * 1e3:.0f} ms; multiply-adds at most {peak:.0f} GFLOP/s\n"]
    lines += ["| product | GFLOP | GFLOP/s alone | ms alone | share of the op |", "|---|---|---|---|---|"]
    total = 0.0
    for name, (a_cell, speed) in products.items():
        flops = 2e-9 * a_cell * shape.cells * shape.images
        alone = flops / speed
        total += alone
        lines.append(f"| {name} | {flops:.2f} | {speed:.0f} | {alone * 1e3:.1f} | {alone / seconds:.0%} |")
    done = 2e-9 * shape.cells * shape.images * sum(a_cell for a_cell, _ in products.values())
    counted = 2e-9 * case.multiply_adds
    lines.append(f"| all | {done:.2f} | {done / total:.0f} | {total * 1e3:.1f} | {total / seconds:.0%} |")
    left = seconds - total
    lines.append(f"| loads, softmax, biases, stores, tables | - | - | {left * 1e3:.1f} | {left / seconds:.0%} |")
    lines.append(
        f"\n{counted:.1f} GFLOP without recomputation, {done:.1f} with it: at the peak {done / peak * 1e3:.0f} ms, so "
        f"the share of the limit is at most {counted / done:.0%}; it is {counted / seconds / peak:.0%}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for count in (42, 300):
        print(profile(count), flush=True)
