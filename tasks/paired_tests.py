"""Tests and 95 % intervals of paired evidence: runs measured in turns, and samples scored by both sides.

Above 0 is worse everywhere: slower, or less accurate. Nothing here knows margins or verdicts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from jetway.tasks.results import Interval
from jetway.tasks.statistics import CONFIDENCE, Floats

_TAIL = (1 - CONFIDENCE) / 2
_BISECTIONS = 60


def median_shift(differences: Floats) -> tuple[float, Interval | None, float]:
    """Where paired differences lie: Hodges-Lehmann estimate, 95 % interval, one-sided p value of its direction.

    Both are exact by Wilcoxon's signed-rank distribution (Hollander, Wolfe and Chicken, Nonparametric Statistical
    Methods, chapter 3): they hold for every symmetric noise, however heavy its tails, and where the order of the
    two sides is drawn for each pair, drift is symmetric too. No interval below six pairs, which have none.
    """
    if not len(differences):
        return 0.0, None, 1.0
    averages = _walsh_averages(np.asarray(differences, dtype=np.float64))
    tails = _signed_rank_tails(len(differences))
    inside = int(np.searchsorted(tails, _TAIL, side="right"))
    interval = (float(averages[inside - 1]), float(averages[-inside])) if inside else None
    agreeing = max(int((averages > 0).sum()), int((averages < 0).sum()))
    return float(np.median(averages)), interval, float(tails[len(averages) - agreeing])


def _walsh_averages(values: Floats) -> Floats:
    """Sorted means of all pairs of values, each with itself included."""
    first, second = np.triu_indices(len(values))
    averages: Floats = np.sort((values[first] + values[second]) / 2)
    return averages


@functools.cache
def _signed_rank_tails(count: int) -> Floats:
    """P(T <= t) for t = 0, 1, ... of the signed-rank statistic where nothing shifted."""
    ways = np.ones(1)
    for rank in range(1, count + 1):
        ways = np.convolve(ways, [0.5, *[0.0] * (rank - 1), 0.5])
    return np.cumsum(ways)


def mcnemar(lost: int, won: int) -> float:
    """Exact one-sided p value of McNemar's test, of the direction seen.

    ``lost`` samples went from right to wrong, ``won`` the other way.
    """
    discordant, ways, total = lost + won, 1, 1
    for won_by_chance in range(1, min(lost, won) + 1):
        ways = ways * (discordant - won_by_chance + 1) // won_by_chance
        total += ways
    return total / (1 << discordant)


def drop_interval(lost: int, won: int, count: int) -> Interval:
    """95 % interval of the difference of two paired proportions, Tango's score interval (Stat. Med. 17, 1998).

    It does not collapse where the sides never differed: 0 of 100 samples still leaves a drop of 3.7 points open.
    """
    critical = NormalDist().inv_cdf(1 - _TAIL)
    score = functools.partial(_tango_score, lost, won, count)
    return (
        _root(lambda drop: score(drop) - critical, -1.0, (lost - won) / count),
        _root(lambda drop: score(drop) + critical, (lost - won) / count, 1.0),
    )


def _tango_score(lost: int, won: int, count: int, drop: float) -> float:
    """How many standard errors the observed drop is above a supposed one."""
    b = -lost - won + (2 * count - lost + won) * drop
    c = -won * drop * (1 - drop)
    won_ratio = (math.sqrt(b * b - 8 * count * c) - b) / (4 * count)
    variance = count * (2 * won_ratio + drop * (1 - drop))
    distance = lost - won - count * drop
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def samples_for(margin: float, discordant_ratio: float, *, power: float = 0.995, alpha: float = 0.025) -> int:
    """Samples that tell a drop of ``margin`` from none, by McNemar's test (Connor, Biometrics 43, 1987).

    ``discordant_ratio`` is the share of samples that one side alone gets right. Fewer than twice the margin are
    counted as that, as the formula is asymptotic. ``alpha`` is one-sided. With the defaults, in simulation, more than
    99 % of comparisons of equally good sides end with a 95 % interval below the margin, and more than 95 % of drops
    by the margin are significant at 1 %.
    """
    if not (0 < margin < 1 and 0 <= discordant_ratio <= 1):
        raise ValueError(f"a margin of {margin} or a discordant share of {discordant_ratio} is no share")
    discordant = max(discordant_ratio, 2 * margin)
    found = NormalDist().inv_cdf(1 - alpha) * math.sqrt(discordant)
    missed = NormalDist().inv_cdf(power) * math.sqrt(discordant - margin**2)
    return math.ceil(((found + missed) / margin) ** 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number, in their order (Holm, Scand. J. Stat. 6, 1979): any dependence will do."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for done, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - done) * p_values[i]))
        adjusted[i] = highest
    return adjusted
