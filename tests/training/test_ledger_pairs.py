"""The cost of a method from noisy timings: the interval covers the truth, outliers and drift do not move it."""

import numpy as np
import pytest

from fastkd.training.cost.pairs import LEAST_PAIRS, compare, median_interval

PAIRS = 12


def noisy(rng, seconds, extra, *, jitter=0.05, drift=0.0, stalls=0.0, pairs=PAIRS):
    """Seconds of steps in turn on a machine that slows down by `drift`; a stalled step takes five times as long."""
    student, method = np.zeros((2, pairs))
    clock = 0
    for pair in range(pairs):
        for row, plain in ((student, seconds), (method, seconds + extra))[:: 1 if pair % 2 == 0 else -1]:
            slow = 1 + drift * clock / (2 * pairs)
            stall = 5.0 if rng.random() < stalls else 1.0
            row[pair] = plain * slow * stall * (1 + jitter * rng.exponential())
            clock += 1
    return student.tolist(), method.tolist()


@pytest.mark.parametrize(
    ("count", "ends"), [(6, [1, 6]), (8, [1, 8]), (9, [2, 8]), (12, [3, 10]), (20, [6, 15])], ids=str
)
def test_interval_is_that_of_the_sign_test(count, ends):
    """The order statistics of published tables of the sign test."""
    values = np.random.default_rng(0).permutation(np.arange(1.0, count + 1)).tolist()
    assert median_interval(values) == ends


@pytest.mark.parametrize("count", range(LEAST_PAIRS))
def test_too_few_pairs_have_no_interval(count):
    assert median_interval([1.0] * count) is None


def test_interval_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(1)
    samples = rng.exponential(size=(4000, PAIRS))
    inside = [low <= np.log(2) <= high for low, high in map(median_interval, samples.tolist())]
    assert 0.95 <= np.mean(inside) <= 0.975  # 0.961 in theory


@pytest.mark.parametrize("noise", [{}, {"drift": 1.0}, {"stalls": 0.1}, {"drift": 1.0, "stalls": 0.1}], ids=str)
def test_a_step_of_one_and_a_half_times_is_never_free(noise):
    """The ratio of 1.5 is found; its interval nearly always excludes 1, and never says that the method is faster."""
    rng = np.random.default_rng(2)
    found = [compare(*noisy(rng, 0.2, 0.1, **noise)) for _ in range(400)]
    assert abs(np.median([one["ratio"] for one in found]) - 1.5) < 0.03
    assert np.mean([one["ratio_interval"][0] > 1 for one in found]) > (0.9 if "stalls" in noise else 0.99)
    assert all(one["ratio_interval"][1] > 1 for one in found)
    assert np.mean([one["ratio_interval"][0] <= 1.5 <= one["ratio_interval"][1] for one in found]) > 0.93


@pytest.mark.parametrize("noise", [{}, {"drift": 1.0, "stalls": 0.2}], ids=str)
def test_a_free_method_is_not_given_a_cost(noise):
    rng = np.random.default_rng(3)
    found = [compare(*noisy(rng, 0.2, 0.0, **noise)) for _ in range(400)]
    assert np.mean([one["seconds_interval"][0] <= 0 <= one["seconds_interval"][1] for one in found]) > 0.93


def test_few_pairs_say_that_the_interval_is_unknown():
    found = compare([1.0, 2.0, 1.0], [2.0, 3.0, 2.5])
    assert found["seconds_interval"] is None and found["ratio_interval"] is None
    assert (found["seconds_per_step"], found["ratio"]) == (1.0, 2.0)


def test_pairs_must_be_complete():
    with pytest.raises(ValueError, match="zip"):
        compare([1.0, 2.0], [2.0])
