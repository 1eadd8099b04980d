import pytest
from scipy.stats import binom

from jetway.tasks import statistics as host
from jetway.tasks.on_device import statistics


def test_median_of_odd_and_even_counts():
    assert statistics.median([3, 1, 2]) == 2
    assert statistics.median([4, 1, 2, 3]) == 2.5


@pytest.mark.parametrize("values", [[1.0] * 4 + [5.0] * 4 + [1.5] * 4, [1.5] * 4 + [0.1] * 4 + [1.0] * 4])
def test_drift_compares_first_and_last_third_either_way(values):
    assert statistics.drift_ratio(values) == pytest.approx(0.5)


def test_drift_needs_three_values():
    assert statistics.drift_ratio([1.0, 9.0]) == 0.0


def test_a_change_of_the_machine_cancels_in_relative_medians():
    assert statistics.relative_medians([2.0, 4.0], [1.0, 2.0]) == [2.0, 2.0]


@pytest.mark.parametrize("percent", [90, 95, 99])
def test_least_queries_are_those_of_early_stopping(percent):
    """The fewest queries of which at most one in a hundred sessions has no more than one slow one by luck."""
    count = statistics.MIN_QUERIES[percent]
    slow = 1 - percent / 100
    assert binom.cdf(1, count, slow) <= 0.01 < binom.cdf(1, count - 1, slow)
    assert host.MIN_QUERIES[percent] == count
