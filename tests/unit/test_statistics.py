import numpy as np
import pytest

from jetway.tasks.statistics import (
    SUMMARIZE_RESAMPLES,
    Resampled,
    paired_drop,
    paired_ratio,
    percentile,
    percentile_intervals,
    round_medians,
)


def mean_of(name):
    return lambda records: {name: float(np.mean([record[name] for record in records]))}


def drop_of(before, after, summarize, metric, **direction):
    return paired_drop(Resampled(before, summarize), Resampled(after, summarize), metric, **direction)


def records(values, name="top1"):
    return [{name: float(value)} for value in values]


@pytest.mark.parametrize(("percent", "expected"), [(50, 5), (90, 9), (91, 10), (99, 10), (100, 10)])
def test_percentile_is_nearest_rank(percent, expected):
    assert percentile(np.arange(1, 11), percent) == expected


def test_round_medians_follow_the_rounds():
    found = round_medians(np.array([5, 1, 9, 4, 6]), np.array([0, 0, 0, 2, 2]))
    assert found.tolist() == [5.0, 5.0]


def test_what_slows_a_round_leaves_the_ratio():
    noise = np.random.default_rng(0).uniform(1, 3, 60)
    value, (low, high) = paired_ratio(0.3 * noise, noise, seed=0)
    assert (value, low, high) == pytest.approx((0.3, 0.3, 0.3))


def test_ratio_interval_holds_the_truth_about_as_often_as_it_says():
    """95 % of 300 simulated sessions of 30 rounds, give or take what 300 can show."""
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(300):
        _, (low, high) = paired_ratio(0.5 * rng.lognormal(0, 0.05, 30), rng.lognormal(0, 0.05, 30), seed=seed)
        hits += low <= 0.5 <= high
    assert 0.91 <= hits / 300 <= 0.99


def test_percentile_intervals_are_by_round_and_not_by_query():
    """Queries that come in rounds of one mood are worth as many as the rounds, not as many as they are."""
    rng = np.random.default_rng(2)
    moods = rng.normal(100, 10, 40)
    rounds = np.repeat(np.arange(40), 50)
    together = (np.repeat(moods, 50) * 1000).astype(np.int64)
    alone = (rng.normal(100, 10, 2000) * 1000).astype(np.int64)
    low, high = percentile_intervals(together, rounds, [50], seed=0)[50]
    narrow_low, narrow_high = percentile_intervals(alone, rounds, [50], seed=0)[50]
    assert high - low > 3 * (narrow_high - narrow_low)
    assert low <= percentile(together, 50) <= high


def test_excluded_rounds_leave_gaps_that_do_not_matter():
    latencies = np.arange(1, 41)
    gaps = np.repeat([0, 3, 7, 9], 10)
    assert percentile_intervals(latencies, gaps, [50], seed=0) == percentile_intervals(
        latencies, np.repeat([0, 1, 2, 3], 10), [50], seed=0
    )


def test_drop_of_a_mean_is_paired():
    """Both are wrong in 100 of 1000; that they are the same ones leaves almost nothing to doubt."""
    before = np.r_[np.zeros(100), np.ones(900)]
    after = before.copy()
    after[500:505] = 0
    drop, (low, high) = drop_of(records(before), records(after), mean_of("top1"), "top1")
    assert drop == pytest.approx(0.005)
    assert 0 <= low < 0.005 < high < 0.012


def test_drop_is_above_zero_when_it_is_worse_whatever_the_direction():
    better, worse = records([1.0, 1.0, 2.0], "error"), records([2.0, 3.0, 3.0], "error")
    drop, (low, high) = drop_of(better, worse, mean_of("error"), "error", higher_is_better=False)
    assert drop > 0
    assert low > 0
    assert high >= drop


def test_a_metric_that_is_no_mean_goes_through_the_workload():
    """The largest record, say: the interval cannot leave the range of what was summarized."""

    def summarize(chosen):
        return {"worst": max(record["worst"] for record in chosen)}

    before, after = records(range(50), "worst"), records(np.arange(50) + 3, "worst")
    drop, (low, high) = drop_of(before, after, summarize, "worst", higher_is_better=False)
    assert (drop, low, high) == (3.0, 3.0, 3.0)


def test_means_and_resampled_summaries_agree():
    rng = np.random.default_rng(3)
    before, after = records(rng.random(200) < 0.9), records(rng.random(200) < 0.85)

    def almost(chosen):
        return {"top1": float(np.mean([record["top1"] for record in chosen])) + 1e-9}

    exact = drop_of(before, after, mean_of("top1"), "top1")
    resampled = drop_of(before, after, almost, "top1")
    assert resampled[0] == pytest.approx(exact[0])
    assert resampled[1] == pytest.approx(exact[1], abs=0.02)


def test_records_of_other_samples_are_refused():
    with pytest.raises(ValueError, match="2 and 3"):
        drop_of(records([1, 1]), records([1, 1, 1]), mean_of("top1"), "top1")


def test_a_set_that_others_are_held_against_is_summarized_once():
    calls = []

    def summarize(chosen):
        calls.append(len(chosen))
        return {"worst": max(record["worst"] for record in chosen), "best": min(r["worst"] for r in chosen)}

    before, *others = (Resampled(records(np.arange(9) + shift, "worst"), summarize) for shift in range(3))
    for other in others:
        for metric in ("worst", "best"):
            paired_drop(before, other, metric, higher_is_better=False)
    assert len(calls) == 3 * (1 + SUMMARIZE_RESAMPLES)
