"""The machine's rates of convolutions and matrix products, measured in the same run as the steps."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.ops.limits import convolution, matmul

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = {"convolutions": convolution, "products": matmul}


def measure(quick: bool = False, repetitions: int = 7) -> dict[str, dict[str, float]]:
    """Operations per second: {"float32" or "bfloat16": {"convolutions": a 3x3 one of 256 channels on 100 x 152 cells,
    channels-last; "products": of two 2048 x 2048 matrices}}; the fastest of several calls.

    Args:
        quick: small operands, for tests.
    """
    rates: dict[str, dict[str, float]] = {}
    for name, dtype in TYPES.items():
        rates[name] = {}
        for kind, make in KINDS.items():
            call, products = make(quick, torch.device("cpu"), dtype)
            call()
            rates[name][kind] = 2 * products / min(_seconds(call) for _ in range(repetitions))
    return rates


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def least_seconds(flops: int, convolutions: int, rates: dict[str, float]) -> float:
    """The time of a step's arithmetic at these rates of one dtype: a lower bound of the step.

    Args:
        flops, convolutions: all operations of the step, and those of convolutions (benchmarks/step/dispatch_ledger.py).
    """
    return convolutions / rates["convolutions"] + (flops - convolutions) / rates["products"]
