"""Where a series of nightly figures moved to another level, and did not come back the next night.

E-divisive: the split that sets two sides of a segment furthest apart by the energy distance (Matteson and James,
J. Am. Stat. Assoc. 109, 2014), with Student's t in place of permutations and weak points merged in the end, as
in Hunter (Fleming et al., ICPE 2023), which is Apache Otava today.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.stats import ttest_ind_from_stats

from jetway.tasks.statistics import Floats

#: Largest p value of a point that is told, and of one that may become one once its neighbours are gone.
MAX_P_VALUE, WEAK_P_VALUE = 0.001, 0.01
#: Fewest nights on either side of a point: one or two odd nights are no new level.
MIN_NIGHTS = 3


@dataclass(frozen=True)
class ChangePoint:
    """From ``index`` on the series is at another level."""

    index: int
    before: float
    after: float
    p_value: float

    @property
    def change_ratio(self) -> float:
        """Share of the level before; infinite where that was 0."""
        return self.after / self.before - 1 if self.before else math.inf


def change_points(values: Sequence[float]) -> list[ChangePoint]:
    """The points where the mean moved, oldest first, each against the levels next to it."""
    series = np.asarray(values, dtype=np.float64)
    return _merged(series, _splits(series, 0, len(series)))


def _splits(series: Floats, start: int, end: int) -> list[int]:
    """Weak points of a segment, and of the segments on both sides of them."""
    if end - start < 2 * MIN_NIGHTS:
        return []
    split = start + _best_split(series[start:end])
    if _point(series, start, split, end).p_value > WEAK_P_VALUE:
        return []
    return [*_splits(series, start, split), split, *_splits(series, split, end)]


def _best_split(segment: Floats) -> int:
    """How many values stand before the split whose sides have the largest energy distance, scaled by their sizes."""
    sums = np.abs(segment[:, None] - segment).cumsum(axis=0).cumsum(axis=1)
    count = len(segment)
    left = np.arange(MIN_NIGHTS, count - MIN_NIGHTS + 1)
    right = count - left
    within_left = sums[left - 1, left - 1]
    between = sums[left - 1, -1] - within_left
    within_right = sums[-1, -1] - within_left - 2 * between
    distance = (
        2 * between / (left * right)
        - within_left / (left * (left - 1))
        - within_right / (right * (right - 1))
    )
    return int(left[np.argmax(left * right / count * distance)])


def _merged(series: Floats, splits: list[int]) -> list[ChangePoint]:
    """Without the weakest point, again and again, until all that are left are beyond chance."""
    edges = [0, *splits, len(series)]
    points = [_point(series, *three) for three in zip(edges, edges[1:], edges[2:], strict=False)]
    weakest = max(points, key=lambda point: point.p_value, default=None)
    if weakest is None or weakest.p_value <= MAX_P_VALUE:
        return points
    return _merged(series, [split for split in splits if split != weakest.index])


def _point(series: Floats, start: int, split: int, end: int) -> ChangePoint:
    before, after = series[start:split], series[split:end]
    return ChangePoint(split, float(before.mean()), float(after.mean()), _p_value(before, after))


def _p_value(before: Floats, after: Floats) -> float:
    """Two-sided, of equal means; figures without any noise differ or do not."""
    if not (np.ptp(before) or np.ptp(after)):
        return float(before[0] == after[0])
    sides = [(side.mean(), side.std(ddof=1), len(side)) for side in (before, after)]
    return float(ttest_ind_from_stats(*sides[0], *sides[1]).pvalue)


def levels(count: int, points: Sequence[ChangePoint]) -> list[tuple[int, int]]:
    """The segments between the points, as (first index, index behind the last)."""
    return list(pairwise([0, *(point.index for point in points), count]))
