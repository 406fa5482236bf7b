"""ICD without a detector, on given pyramids: too small to measure as the difference of two whole steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.step.candidates import FORMS, NUM_CLASSES, Problem, is_low, priors
from benchmarks.step.dispatch_ledger import count
from fastkd.distillers import ICD
from fastkd.ops import use_backend

CPU = torch.device("cpu")
METHOD = "icd"


def pyramid(problem: Problem, channels: int, low: bool, seed: int) -> list[Tensor]:
    """Random P3 .. P7; low: bfloat16 and channels-last."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(-(-problem.height // stride), -(-problem.width // stride)) for stride in (8, 16, 32, 64, 128)]
    levels = [torch.randn(problem.images, channels, *size, generator=generator) for size in sizes]
    return [level.bfloat16().contiguous(memory_format=torch.channels_last) if low else level for level in levels]


def call(problem: Problem, form: str, channels: int) -> Callable[[], None]:
    """Forward and backward of a form of ICD on a student's and a teacher's pyramid."""
    torch.manual_seed(0)
    icd, batch, low = ICD(NUM_CLASSES, priors(), channels), problem.batch(), is_low(form)
    student, teacher = (pyramid(problem, channels, low, seed) for seed in (0, 1))
    for level in student:
        level.requires_grad_()

    def work() -> None:
        backend = use_backend("reference" if form.startswith("plain") else "compiled")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low), backend:
            losses = icd(student, batch, teacher).losses
        sum(value.float() for value in losses.values()).backward()
        for tensor in (*student, *icd.parameters()):
            tensor.grad = None

    return work


def measure(problem: Problem, forms: list[str], repetitions: int, channels: int = 256) -> dict[str, Any]:
    """{"problem", "entries": {form: seconds, ledger, transient_bytes}}; the forms are interleaved."""
    calls = {form: call(problem, form, channels) for form in FORMS if form in forms}
    entries = {}
    for form, work in calls.items():
        work()
        entries[form] = {
            "seconds": [],
            "ledger": dataclasses.asdict(count(work)),
            "transient_bytes": memory.measure(work, CPU).peak,
        }
    for turn in range(repetitions):
        for form in calls if turn % 2 == 0 else reversed(calls):
            begin = time.perf_counter()
            calls[form]()
            entries[form]["seconds"].append(time.perf_counter() - begin)
    return {"problem": dataclasses.asdict(problem), "entries": entries}
