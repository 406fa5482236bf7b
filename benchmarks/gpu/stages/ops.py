"""Peak rates of the card, and op times at a training batch: fastkd, plain torch, and torch.compile.

B = 16, 800 x 1344, bfloat16, channels-last, forward and backward (benchmarks/ops/rows.py). Calls without
torch.compile run first; compilation runs ahead, in parallel, and fills torch.compile's cache.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.roofline import PUBLISHED
from benchmarks.gpu.stages import Context
from benchmarks.gpu.stages.timing import measure
from benchmarks.ops.draws import QUICK, Draw, Shape
from benchmarks.ops.rows import BY_NAME, ROWS, Case
from benchmarks.step.steps import Step, assert_same, tensors

WAITING = ("slices", "selection")  # plain forms that synchronise, so that no CUDA graph can capture them


class DeviceDraw(Draw):
    """Draws on the device: a pyramid of 16 images takes seconds on the host."""

    def tensor(self, *sizes: int, grad: bool = False, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        if self.device.type == "cpu":
            return super().tensor(*sizes, grad=grad, scale=scale, shift=shift)
        if not hasattr(self, "on_device"):
            self.on_device = torch.Generator(self.device).manual_seed(0)
        value = torch.randn(sizes, generator=self.on_device, device=self.device) * scale + shift
        return value.to(self.dtype).requires_grad_(grad)


def build(row: str, context: Context) -> tuple[Case, Shape]:
    """The arguments of a benchmark row and their shape."""
    shape = QUICK if context.toy else BY_NAME[row].shape(PUBLISHED)
    return BY_NAME[row].build(DeviceDraw(shape, torch.bfloat16, True, torch.device(context.device))), shape


def call_of(step: Step) -> Callable[[], object]:
    """Forward and backward without synchronisation, so that a CUDA graph can capture it."""

    def call() -> list[Tensor]:
        results = tensors(step.function(*step.arguments))
        roots = [result for result in results if result.requires_grad]
        return [*results, *(torch.autograd.grad(roots, step.wanted, step.cotangents) if roots else ())]

    return call


def compiled(case: Case, context: Context) -> Callable:
    """The plain form under torch.compile."""
    torch._dynamo.reset()
    backend = "aot_eager" if context.toy else "inductor"
    return torch.compile(case.plain[case.compiled], dynamic=False, fullgraph=True, backend=backend)


def rates(context: Context) -> None:
    """Rates of copies, products and convolutions, the base of the fractions in the report."""
    device, size = torch.device(context.device), 64 if context.toy else 8192
    seconds = 0.0 if context.toy else 0.2
    source = torch.empty(2**12 if context.toy else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = measure(lambda: target.copy_(source), device, seconds, captured=False)
    context.record("copy", {"gb_per_s": 2 * source.numel() / found["wall_min_ms"] / 1e6})
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        found = measure(lambda a=a, b=b: a @ b, device, seconds, captured=False)
        context.record(f"product {kind}", {"tflop_per_s": 2 * size**3 / found["wall_min_ms"] / 1e9})
        images, channels, side = (1, 16, 16) if context.toy else (16, 256, 128)
        x = torch.randn(images, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        found = measure(lambda x=x, w=w: F.conv2d(x, w, padding=1), device, seconds, captured=False)
        work = 2 * 9 * channels**2 * images * side**2
        context.record(f"convolution {kind}", {"tflop_per_s": work / found["wall_min_ms"] / 1e9})


def uncompiled(row: str, context: Context) -> dict[str, Any]:
    """{"shape", "sides": {"ours", "plain: FORM"}} of a row; ours is checked against the first plain form."""
    case, shape = build(row, context)
    device, found = torch.device(context.device), {}
    seconds = 0.0 if context.toy else 0.3
    ours = Step(case.ours, case.arguments)
    expected = None
    for name, function in case.plain.items():
        try:
            plain = Step(function, case.arguments)
            expected = expected or plain
            found[f"plain: {name}"] = measure(call_of(plain), device, seconds, captured=name not in WAITING)
        except torch.OutOfMemoryError as error:
            found[f"plain: {name}"] = {"out_of_memory": str(error)[:200]}
    found["ours"] = measure(call_of(ours), device, seconds)
    entry = {"shape": dataclasses.asdict(shape), "sides": found}
    if expected is not None:
        try:
            assert_same(ours, expected, torch.bfloat16)
        except AssertionError as error:  # both are rounded to bfloat16: reported beside the times
            entry["differs"] = str(error)
    return entry


def compile_ahead(rows: list[str], context: Context) -> None:
    """Fill torch.compile's cache, one process per row."""
    if context.toy:
        return
    code = (
        "import sys; from benchmarks.gpu.stages import Context; from benchmarks.gpu.stages import ops; "
        "c = Context('cuda'); case, _ = ops.build(sys.argv[1], c); "
        "ops.call_of(ops.Step(ops.compiled(case, c), case.arguments))()"
    )
    limit = max(context.left / 2, 1)

    def one(row: str) -> None:
        try:
            subprocess.run([sys.executable, "-c", code, row], timeout=limit, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            print(f"{row}: not compiled within {limit:.0f} s", flush=True)

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        list(pool.map(one, rows))


def ops(context: Context) -> None:
    """The stage: rates of the card, then one entry per row."""
    torch.backends.cudnn.benchmark = True
    context.attempt("rates", lambda: (rates(context), "ok")[1])
    rows = [row.name for row in ROWS]
    if context.toy:
        rows = ["instance_norm_mse", "masked_mse"]
    for row in rows:
        if context.left < 0:
            context.record(row, {"error": "no time"})
        else:
            context.attempt(row, lambda row=row: uncompiled(row, context))
        torch.cuda.empty_cache()
    compile_ahead(rows, context)
    for row in rows:
        entry = context.found.get(row, {})
        if context.left < 5 or "sides" not in entry:
            continue
        try:
            case, _ = build(row, context)
            step = Step(compiled(case, context), case.arguments)
            seconds = 0.0 if context.toy else 0.3
            entry["sides"]["compiled"] = measure(call_of(step), torch.device(context.device), seconds)
        except Exception as error:
            entry["sides"]["compiled"] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        context.record(row, entry)
