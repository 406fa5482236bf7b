"""The measurements of `benchmarks.ops`, one pytest-benchmark timing each.

benchmarks/ops/__main__.py writes the list of points to a file, sets FASTKD_BENCH_PLAN to its path and runs pytest on
this module; other measurements than the time are stored in the benchmark's extra_info.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks import memory
from benchmarks.ops.draws import Draw, Shape
from benchmarks.ops.limits import LIMITS, floor
from benchmarks.ops.rows import BY_NAME, Case
from benchmarks.step.steps import Step, assert_same

PLAN = json.loads(Path(os.environ["FASTKD_BENCH_PLAN"]).read_text(encoding="utf-8"))
DEVICE = torch.device(PLAN["device"])


@functools.lru_cache(maxsize=1)
def build(row: str, shape: Shape, dtype: torch.dtype, channels_last: bool) -> Case:
    return BY_NAME[row].build(Draw(shape, dtype, channels_last, DEVICE, PLAN["seed"]))


def function_of(case: Case, side: str):
    if side == "ours":
        return case.ours
    if side == "compiled":
        torch._dynamo.reset()
        return torch.compile(case.plain[case.compiled], dynamic=False, fullgraph=True, backend=PLAN["backend"])
    return case.plain[side.removeprefix("plain: ")]


def check(case: Case, step: Step, dtype: torch.dtype) -> None:
    """Compare the call to be timed with the first plain form in float32."""
    wide = tree_map(
        lambda leaf: (
            leaf.detach().float().requires_grad_(leaf.requires_grad)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
        ),
        case.arguments,
    )
    first = next(iter(case.plain.values()))
    assert_same(step, Step(first, wide if dtype != torch.float32 else case.arguments), dtype)


def work_of(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Necessary bytes, and multiply-adds."""
    read, written = (
        sum(sum(one.reads) for one in case.passes) * dtype.itemsize,
        sum(one.writes for one in case.passes) * dtype.itemsize,
    )
    return {"read": read, "written": written, "bytes": read + written, "multiply_adds": case.multiply_adds}


def run(benchmark, call, seconds: float = PLAN["seconds"]) -> None:
    """Time rounds for about `seconds`, after a warm-up."""
    begin = time.perf_counter()
    call()
    taken = max(time.perf_counter() - begin, 1e-6)
    rounds = int(min(max(seconds / taken, PLAN["rounds"]), 100 * PLAN["rounds"]))
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1, iterations=1)


@pytest.mark.parametrize("name", PLAN["limits"])
def test_limit(benchmark, name):
    torch.set_num_threads(PLAN["threads"])
    call, work = LIMITS[name][0](PLAN["quick"], DEVICE)
    benchmark.extra_info.update(kind="limit", name=name, work=work)
    if DEVICE.type == "cuda":
        run(benchmark, lambda: (call(), torch.cuda.synchronize(DEVICE)))
    else:
        run(benchmark, call)


@pytest.mark.parametrize("point", PLAN["points"], ids=lambda point: point["id"])
def test_point(benchmark, point):
    torch.set_num_threads(point["threads"])
    shape = Shape(**{**point["shape"], "strides": tuple(point["shape"]["strides"])})
    dtype = getattr(torch, point["dtype"])
    case = build(point["row"], shape, dtype, point["channels_last"])
    if point["side"] == "floor":
        benchmark.extra_info.update(point, work=work_of(case, dtype), cells=shape.cells)
        return run(benchmark, floor(case.passes, dtype))
    begin = time.perf_counter()
    step = Step(function_of(case, point["side"]), case.arguments)
    if point["kind"] != "growth" and point["side"] != f"plain: {next(iter(case.plain))}":
        check(case, step, dtype)
    kept = step()
    benchmark.extra_info.update(
        point,
        work=work_of(case, dtype),
        returned=sum(leaf.numel() * leaf.element_size() for leaf in kept),
        backward=bool(step.cotangents),
        cells=shape.cells,
        first_call_seconds=time.perf_counter() - begin,
    )
    del kept
    if point["kind"] == "main":
        benchmark.extra_info["memory"] = dataclasses.asdict(memory.measure(step, DEVICE))
    run(
        benchmark, step, PLAN["seconds"] * (0.4 if point["kind"] == "growth" else 1)
    )  # growth points are half of all points
