"""Random cases of a test: other ones in every run, few by default and many under `pytest --long`.

FASTKD_TEST_SEED repeats the cases of a run; conftest.py draws it, and prints it at the start and below a failed test.
"""

import os

LONG = "FASTKD_TEST_LONG"  # set by `pytest --long`, for helpers and for processes that tests start


def seed() -> int:
    return int(os.environ.get("FASTKD_TEST_SEED", "0"))


def draws(many: int) -> int:
    """Number of random cases: `many` under --long, else a fifth."""
    return many if os.environ.get(LONG) else max(1, many // 5)
