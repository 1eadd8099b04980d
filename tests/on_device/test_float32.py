import numpy as np
import pytest

from jetway.tasks.on_device import float32


def independent(values):
    """trtexec's rule once more, by numpy's own float32 arithmetic."""
    ordered = np.sort(np.asarray(values, dtype=np.float32))
    count = len(ordered)
    middle = count // 2
    mean = np.cumsum(ordered, dtype=np.float32)[-1] / np.float32(count)
    squares = np.cumsum((ordered - mean) ** 2, dtype=np.float32)[-1] / np.float32(count)
    pair = (ordered[middle - 1] + ordered[middle]) / np.float32(2)
    found = {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "median": ordered[middle] if count % 2 else pair,
        "variation_ratio": np.sqrt(squares) / mean,
    }
    for percent in (90, 95, 99):
        share = np.float32(1) - np.float32(percent) / np.float32(100)
        found[f"p{percent}"] = ordered[max(count - 1 - int(share * np.float32(count)), 0)]
    return {name: float(value) for name, value in found.items()}


def test_a_thousand_random_logs_come_to_the_same_digits():
    random = np.random.default_rng(0)
    for _ in range(1000):
        count = int(random.integers(1, 3000))
        median_ms = 10.0 ** random.uniform(-2, 2)
        values = median_ms * random.lognormal(0, random.choice([0.001, 0.05, 0.5]), count)
        assert float32.summary(values) == independent(values)


@pytest.mark.parametrize("percent", [90, 95, 99])
def test_every_count_up_to_five_thousand_picks_the_same_element(percent):
    ordered = np.arange(5000.0)
    share = np.float32(1) - np.float32(percent) / np.float32(100)
    for count in range(1, 5001):
        expected = max(count - 1 - int(share * np.float32(count)), 0)
        assert float32.percentile(ordered[:count], percent) == expected


def test_double_precision_would_pick_another_query():
    """Why it is done in float32 at all: 1 - 0.9 is a little less than 0.1 there, and more in double."""
    counts = [
        n
        for n in range(1, 5001)
        if int((1 - 90 / 100) * n) != int(np.float32(1 - np.float32(0.9)) * np.float32(n))
    ]
    assert len(counts) > 10


def test_throughput_and_rounding():
    assert float32.throughput_per_s(3000, 2500.0) == 1200.0
    assert float32.rounded(0.1) == float(np.float32(0.1)) != 0.1


def test_times_that_are_all_zero_do_not_vary():
    assert float32.summary([0.0, 0.0])["variation_ratio"] == 0.0
