"""Random cases of a test: other ones in every run, few by default and many under `pytest --long`.

FASTKD_TEST_SEED repeats the cases of a run; conftest.py draws it, and prints it at the start and below a failed test.
"""

import os
import random
from collections import defaultdict

LONG = "FASTKD_TEST_LONG"  # set by `pytest --long`, for helpers and for processes that tests start


def seed() -> int:
    return int(os.environ.get("FASTKD_TEST_SEED", "0"))


def draws(many: int) -> int:
    """Number of random cases: `many` under --long, else a fifth."""
    return many if os.environ.get(LONG) else max(1, many // 5)


def left_out(items) -> set:
    """Which of pytest's items a run without --long leaves out of the tests marked `sampled`.

    The parameter sets of such a test are gone through in random order; one stays if it brings a value of any parameter
    that none before it had. So every value of every parameter is run, together with other ones in every run.
    """
    tests, out = defaultdict(list), set()
    for item in items:
        if item.get_closest_marker("sampled"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for name, cases in tests.items():
        seen = set()
        for case in random.Random(f"{seed()} {name}").sample(cases, len(cases)):
            values = set(case.callspec.indices.items())
            if values <= seen:
                out.add(case)
            seen |= values
    return out
