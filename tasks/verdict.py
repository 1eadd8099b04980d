"""Verdicts of a candidate against a baseline: whether something got worse, and on what evidence that is said."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from enum import StrEnum
from statistics import NormalDist
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jetway.tasks.paired_tests import drop_interval, holm, mcnemar, median_shift, samples_for
from jetway.tasks.results import Interval
from jetway.tasks.statistics import Floats

K = TypeVar("K", bound=Hashable)

#: Largest slowdown that does not matter, as a share.
LATENCY_MARGIN = 0.03
#: Smallest drop of a score that must not pass unseen.
ACCURACY_MARGIN = 0.01
#: Chance that a verdict on what did not change is REGRESSED, and as large a one that it is IMPROVED.
FALSE_ALARM_RATIO = 0.01
#: Pairs of runs after which the evidence is looked at, and the share of the false alarms that each look may spend.
#: Their sum holds for all looks together, however they depend on each other (alpha spending by Bonferroni's
#: inequality; Lan and DeMets, Biometrika 70, 1983). Seven pairs can show that two engines are the same, no more.
LOOKS = {7: 0.0, 10: 0.007, 14: 0.0015, 20: 0.0015}
_QUANTILE_95 = NormalDist().inv_cdf(0.975)


class Change(StrEnum):
    REGRESSED = "REGRESSED"
    SAME = "SAME"
    IMPROVED = "IMPROVED"
    UNKNOWN = "UNKNOWN"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Evidence(_Value):
    """How much worse the candidate is by one metric, whatever the metric's direction; below 0 it is better."""

    effect: float = Field(
        description="A share of the baseline for runs, 0.05 is 5 %; a difference of scores."
    )
    interval: Interval | None = Field(
        description="Of the effect, 95 %; None where there is too little for one."
    )
    p_value: float = Field(description="Of no change, one-sided, in the direction of the effect.")
    count: int = Field(description="Valid runs a side, or samples.")
    unit: Literal["runs", "samples"]
    margin: float
    rule: Literal["equivalence", "non-inferiority"]
    samples_needed: int | None = Field(
        default=None, description="Recommended for the margin, where samples differ as often as these did."
    )


class MetricVerdict(Evidence):
    """Evidence and what it says; ``p_value`` is adjusted for the metrics that were judged together."""

    change: Change
    reason: str


def timing_evidence(
    baseline: Sequence[float | None],
    candidate: Sequence[float | None],
    *,
    margin: float = LATENCY_MARGIN,
    higher_is_better: bool = False,
) -> Evidence:
    """Of runs in pairs, next to each other in time: one figure a run, such as its median latency.

    The run is the unit, as what differs between processes is most of the noise. None is a run that was INVALID;
    its pair does not count. Raises ValueError for sides that differ in length.
    """
    pairs = [pair for pair in zip(baseline, candidate, strict=True) if None not in pair]
    before, after = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    shift, interval, p_value = median_shift(np.log(before / after if higher_is_better else after / before))
    return Evidence(
        effect=math.expm1(shift),
        interval=None if interval is None else (math.expm1(interval[0]), math.expm1(interval[1])),
        p_value=p_value,
        count=len(pairs),
        unit="runs",
        margin=margin,
        rule="equivalence",
    )


def correctness_evidence(
    baseline: Sequence[float] | Floats,
    candidate: Sequence[float] | Floats,
    *,
    margin: float = ACCURACY_MARGIN,
) -> Evidence:
    """Of samples that each side gets right (1) or wrong (0), the same samples in the same order.

    Raises ValueError for sides that differ in length.
    """
    before, after = np.asarray(baseline), np.asarray(candidate)
    if before.shape != after.shape:
        raise ValueError(f"{before.size} and {after.size} results are not of the same samples")
    lost, won, count = int((before > after).sum()), int((before < after).sum()), before.size
    return Evidence(
        effect=(lost - won) / count,
        interval=drop_interval(lost, won, count),
        p_value=mcnemar(lost, won),
        count=count,
        unit="samples",
        margin=margin,
        rule="non-inferiority",
        samples_needed=samples_for(margin, (lost + won) / count),
    )


def score_evidence(
    drop: float, interval: Interval, count: int, *, differing: int, margin: float = ACCURACY_MARGIN
) -> Evidence:
    """Of a score that is no share of right samples: its drop and interval by ``statistics.paired_drop``.

    ``differing`` samples of ``count`` have different records. Where none has, the bootstrap has nothing to draw,
    and what that many samples can miss stands instead (3.7 / count, the rule of three at 97.5 %).
    """
    error = (interval[1] - interval[0]) / (2 * _QUANTILE_95)
    missed = 1 - (0.025 ** (1 / count))
    return Evidence(
        effect=drop,
        interval=interval if differing else (-missed, missed),
        p_value=1 - NormalDist().cdf(abs(drop) / error) if error > 0 else 1.0,
        count=count,
        unit="samples",
        margin=margin,
        rule="non-inferiority",
        samples_needed=_samples_of_score(error, count, margin),
    )


def judge(evidence: Mapping[K, Evidence], *, alpha: float = FALSE_ALARM_RATIO) -> dict[K, MetricVerdict]:
    """One verdict a metric, false alarms held to ``alpha`` over all of them together (Holm).

    By equivalence (times): REGRESSED is significant and more than the margin; SAME has its whole interval
    inside the margin. By non-inferiority (scores): REGRESSED is significant; SAME has the interval's bad end inside
    the margin. More scores together take more samples each, and the numbers recommended say so. That all are the
    same needs no correction (Berger, Technometrics 24, 1982).
    """
    adjusted = holm([one.p_value for one in evidence.values()])
    return {
        metric: _verdict(_together(one, p_value, alpha / len(evidence)), alpha)
        for (metric, one), p_value in zip(evidence.items(), adjusted, strict=True)
    }


def overall(changes: Sequence[Change]) -> Change:
    """REGRESSED if one is, else UNKNOWN if one is or there is none, else IMPROVED if one is, else SAME."""
    order = (Change.REGRESSED, Change.UNKNOWN, Change.IMPROVED, Change.SAME)
    return next((change for change in order if change in changes), Change.UNKNOWN)


def remaining_alpha(last_look: int) -> float:
    """What the final look may spend when the budget ends before the next planned one: all that no look has.

    That holds where the clock ends it, and not what was seen.
    """
    return sum(share for look, share in LOOKS.items() if look > last_look)


def _together(evidence: Evidence, p_value: float, share: float) -> Evidence:
    """Evidence that is judged with others: its adjusted p value, and samples for its share of the false alarms."""
    needed = evidence.samples_needed
    if needed is not None:
        needed = math.ceil(needed * _more_samples(share))
    return evidence.model_copy(update={"p_value": p_value, "samples_needed": needed})


def _more_samples(alpha: float) -> float:
    """How many times the samples of one comparison find 95 % of drops by the margin where each may spend ``alpha``."""
    quantile = NormalDist().inv_cdf
    return max(1.0, ((quantile(1 - alpha) + quantile(0.95)) / (quantile(0.975) + quantile(0.995))) ** 2)


def _samples_of_score(error: float, count: int, margin: float) -> int:
    """As ``paired_tests.samples_for``, by the standard error that ``count`` samples gave."""
    distance = (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.995)) * error / margin
    without_differences = math.log(0.025) / math.log(1 - margin)
    return math.ceil(max(count * distance**2, without_differences))


def _verdict(evidence: Evidence, alpha: float) -> MetricVerdict:
    change = _change(evidence, alpha)
    reason = _unknown_reason(evidence) if change is Change.UNKNOWN else ""
    return MetricVerdict(**evidence.model_dump(), change=change, reason=reason)


def _change(evidence: Evidence, alpha: float) -> Change:
    if evidence.interval is None:
        return Change.UNKNOWN
    low, high = evidence.interval
    if -evidence.margin <= low and high <= evidence.margin:
        return Change.SAME
    if evidence.p_value <= alpha and abs(evidence.effect) > _least_effect(evidence):
        return Change.REGRESSED if evidence.effect > 0 else Change.IMPROVED
    not_worse = evidence.rule == "non-inferiority" and high <= evidence.margin
    return Change.SAME if not_worse else Change.UNKNOWN


def _least_effect(evidence: Evidence) -> float:
    return evidence.margin if evidence.rule == "equivalence" else 0.0


def _unknown_reason(evidence: Evidence) -> str:
    seen = f"{evidence.count} {evidence.unit}"
    if evidence.interval is None:
        return f"{seen} a side, where six are the fewest that bound a change"
    few = evidence.samples_needed is not None and evidence.samples_needed > evidence.count
    advice = f"; {evidence.samples_needed:,} are recommended" if few else ""
    return f"{seen} leave {_share(evidence.interval[0])} to {_share(evidence.interval[1])} open{advice}"


def _share(value: float) -> str:
    return f"{value:+.2%}".replace("%", " %")
