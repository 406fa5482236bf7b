"""Random cases of a test: other ones in every run, few by default and many under `pytest --long`.

FASTKD_TEST_SEED repeats the cases of a run; conftest.py draws it, and prints it at the start and below a failed test.
"""

import os
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest

LONG = "FASTKD_TEST_LONG"  # set by `pytest --long`, for helpers and for processes that tests start


def seed() -> int:
    return int(os.environ.get("FASTKD_TEST_SEED", "0"))


def draws(many: int) -> int:
    """Number of random cases: `many` under --long, else a fifth."""
    return many if os.environ.get(LONG) else max(1, many // 5)


def few(values: Sequence) -> list:
    """One of the values, another one in every run; all of them under --long."""
    return list(values) if os.environ.get(LONG) else [random.Random(seed()).choice(values)]


def covering(cases: Sequence, values_of: Callable, name: str) -> list:
    """Some of the cases, which together have every value that any of them has; other ones in every run.

    They are gone through in random order; one is taken if it brings a value that none before it had.
    """
    chosen, seen = [], set()
    for case in random.Random(f"{seed()} {name}").sample(cases, len(cases)):
        values = set(values_of(case))
        if not values <= seen:
            chosen.append(case)
        seen |= values
    return chosen


def some(cases: Sequence, values_of: Callable, name: str) -> list:
    """Arguments of pytest.mark.parametrize: `covering` cases, the others marked long."""
    short = covering(cases, values_of, name)
    return [pytest.param(*case, marks=[] if case in short else [pytest.mark.long]) for case in cases]


def left_out(items: Sequence) -> set:
    """Which of pytest's items, cases of tests marked `sampled`, a run without --long leaves out.

    All values of every parameter of a test are run, but few of their pairs.
    """
    tests, out = defaultdict(list), set(items)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    for name, cases in tests.items():
        # the names of a case's values, one for each pytest.mark.parametrize
        out -= set(covering(cases, lambda item: enumerate(item.callspec._idlist), name))
    return out
