"""Percentiles, and 95 % intervals by bootstrap over the units that are independent: rounds, and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jetway.tasks.results import Interval

Floats = NDArray[np.float64]
Integers = NDArray[np.integer[Any]]

CONFIDENCE = 0.95
RESAMPLES = 1000
# A workload's own summarize may be slow (a mean average precision), and is called once a resample.
SUMMARIZE_RESAMPLES = 200

#: Fewest queries that support a percentile at 99 % confidence when one query may be over the latency: early
#: stopping of LoadGen (MLPerf Inference rules) with d = 0, c = 0.99, t = 1. Ten are enough for a median.
MIN_QUERIES = {50: 10, 90: 64, 95: 130, 99: 662}


def percentile(values: Floats | Integers, percent: float) -> float:
    """Nearest rank: the smallest of the values that at least ``percent`` of them do not exceed."""
    return float(np.percentile(values, percent, method="inverted_cdf"))


def supports(count: int, percent: int) -> bool:
    """Whether so many queries are evidence enough for the percentile."""
    return count >= MIN_QUERIES[percent]


def round_medians(latencies: Integers, rounds: Integers) -> Floats:
    """Median latency of each round, in the order of the rounds."""
    starts = np.flatnonzero(np.diff(rounds, prepend=-1))
    return np.array([np.median(part) for part in np.split(latencies, starts[1:])], dtype=np.float64)


def paired_ratio(medians: Floats, base: Floats, *, seed: int) -> tuple[float, Interval]:
    """Median over the rounds of ``medians / base``, with its interval.

    Both ran in every round, so what slows a round slows both, and only the ratio of one round with itself is
    taken. The interval covers this session's noise, not what loading the engines anew would change.
    """
    ratios = medians / base
    picks = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    return float(np.median(ratios)), _interval(np.median(ratios[picks], axis=1))


def percentile_intervals(
    latencies: Integers, rounds: Integers, percents: Sequence[int], *, seed: int
) -> dict[int, Interval]:
    """Interval of each percentile of the latencies, in their own unit, by bootstrap over rounds."""
    order = np.argsort(latencies, kind="stable")
    ordered, round_of = latencies[order], np.unique(rounds, return_inverse=True)[1][order]
    count = int(round_of.max()) + 1
    draws = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1 / count), size=SUMMARIZE_RESAMPLES
    )
    found = np.array([_weighted_percentiles(ordered, draw[round_of], percents) for draw in draws])
    return {percent: _interval(found[:, i]) for i, percent in enumerate(percents)}


def _weighted_percentiles(ordered: Integers, weights: Integers, percents: Sequence[int]) -> Floats:
    cumulative = np.cumsum(weights)
    ranks = np.ceil(np.array(percents) / 100 * cumulative[-1])
    return np.asarray(ordered[np.searchsorted(cumulative, ranks)], dtype=np.float64)


def rate(counts: Integers, seconds: Floats, *, seed: int) -> tuple[float, Interval]:
    """What was counted a second over all rounds, with its interval by bootstrap over rounds."""
    picks = np.random.default_rng(seed).integers(len(counts), size=(RESAMPLES, len(counts)))
    rates = counts[picks].sum(axis=1) / seconds[picks].sum(axis=1)
    return float(counts.sum() / seconds.sum()), _interval(rates)


class Resampled:
    """Records of samples, their summary, and its values over bootstrap resamples.

    Sets of as many samples and one seed are resampled alike, sample by sample. ``summarize`` may be slow: keep the
    set that others are held against.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        summarize: Callable[[Sequence[Any]], Mapping[str, float]],
        *,
        seed: int = 0,
    ) -> None:
        self.records, self.summarize, self.seed = records, summarize, seed

    @cached_property
    def summary(self) -> Mapping[str, float]:
        return self.summarize(self.records)

    @cached_property
    def summaries(self) -> list[Mapping[str, float]]:
        rng, size = np.random.default_rng(self.seed), len(self.records)
        draws = (rng.integers(size, size=size) for _ in range(SUMMARIZE_RESAMPLES))
        return [self.summarize([self.records[i] for i in draw]) for draw in draws]

    def is_mean(self, metric: str) -> bool:
        """Whether the metric is the mean of what the records hold under its name."""
        if not all(isinstance(record.get(metric), (int, float)) for record in self.records):
            return False
        return math.isclose(float(np.mean(self.column(metric))), self.summary[metric], abs_tol=1e-12)

    def column(self, metric: str) -> Floats:
        return np.array([record[metric] for record in self.records], dtype=np.float64)


def paired_drop(
    baseline: Resampled, other: Resampled, metric: str, *, higher_is_better: bool = True
) -> tuple[float, Interval]:
    """What a metric lost against the baseline on the same samples (above 0 is worse), with its interval.

    Bootstrap over samples, the same ones on both sides. Metrics that are means of their records are
    resampled as means; any other goes through ``summarize`` of the workload each time.
    """
    if len(baseline.records) != len(other.records):
        raise ValueError(
            f"{len(baseline.records)} and {len(other.records)} records are not of the same samples"
        )
    sign = 1.0 if higher_is_better else -1.0
    drop = sign * (baseline.summary[metric] - other.summary[metric])
    if baseline.is_mean(metric) and other.is_mean(metric):
        differences = sign * (baseline.column(metric) - other.column(metric))
        return drop, _interval(_resampled_means(differences, np.random.default_rng(baseline.seed)))
    pairs = zip(baseline.summaries, other.summaries, strict=True)
    return drop, _interval(np.array([sign * (before[metric] - after[metric]) for before, after in pairs]))


def _resampled_means(values: Floats, rng: np.random.Generator) -> Floats:
    """One resample at a time: a large data set times all resamples would not fit in memory."""
    size = len(values)
    return np.array([values[rng.integers(size, size=size)].mean() for _ in range(RESAMPLES)])


def _interval(values: Floats) -> Interval:
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
