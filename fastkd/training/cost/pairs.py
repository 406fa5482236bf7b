"""Cost of a method from pairs of steps, with a confidence interval that assumes nothing about the noise.

Both steps of a pair follow each other and take the same batch, and the pairs alternate in order. Whatever slows the
machine for longer than a pair slows both steps; the median leaves out the pairs that something shorter disturbed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

CONFIDENCE = 0.95
LEAST_PAIRS = 6  # of fewer, no two order statistics enclose the median with 95 % confidence


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> list[float] | None:
    """A confidence interval of the median of what `values` are independent samples of.

    Between the k-th smallest and the k-th largest value; k is the largest number with
    P(Binomial(n, 1/2) < k) <= (1 - confidence) / 2, as in the sign test.

    Returns: [low, high]; None if there are too few values.
    """
    count, below, cut = len(values), 0, 0
    while cut < count:
        below += math.comb(count, cut)
        if below > (1 - confidence) / 2 * 2**count:
            break
        cut += 1
    return [sorted(values)[cut - 1], sorted(values)[count - cut]] if cut else None


def compare(student: Sequence[float], method: Sequence[float]) -> dict[str, Any]:
    """Extra time of a method from the seconds of paired steps.

    Args:
        student: seconds of the steps of the student alone.
        method: seconds of the steps with the method, in the order of `student`.
    Returns: {"seconds_per_step", "seconds_interval"}, the median of method - student, and {"ratio", "ratio_interval"},
        the median of method / student; intervals are [low, high], or None with fewer than LEAST_PAIRS pairs.
    """
    differences = [b - a for a, b in zip(student, method, strict=True)]
    ratios = [b / a for a, b in zip(student, method, strict=True)]
    return {
        "seconds_per_step": statistics.median(differences),
        "seconds_interval": median_interval(differences),
        "ratio": statistics.median(ratios),
        "ratio_interval": median_interval(ratios),
    }
