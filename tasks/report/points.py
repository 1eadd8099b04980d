"""Points of the charts that hold accuracy against a cost: a row each, with the intervals that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jetway.tasks.metrics import Metric
from jetway.tasks.report.material import baseline_of
from jetway.tasks.results import Interval, VariantResult, drop_name


@dataclass(frozen=True)
class Point:
    """One variant: what it costs (lower is better), how it scores, and the number of its mark."""

    label: str
    cost: float
    score: float
    cost_interval: Interval | None = None
    score_interval: Interval | None = None
    counted: bool = True
    mark: int = 0


def latency_points(rows: Sequence[VariantResult], metric: Metric, order: Sequence[str]) -> list[Point]:
    """One target's rows by their median latency in ms. Of an invalid session no point counts.

    ``order`` gives the variants of a report their marks, which are the same in all of its charts.
    """
    return _points(rows, metric, order, "latency_ms_p50", timed=True)


def size_points(rows: Sequence[VariantResult], metric: Metric, order: Sequence[str]) -> list[Point]:
    """One target's rows by the size of their engine in MB, which no disturbance of a session changes."""
    return _points(rows, metric, order, "size_bytes", scale=1e-6)


def _points(
    rows: Sequence[VariantResult],
    metric: Metric,
    order: Sequence[str],
    cost: str,
    *,
    scale: float = 1.0,
    timed: bool = False,
) -> list[Point]:
    baseline = baseline_of(rows)
    points = []
    for row in rows:
        value, score = row.value(cost), row.value(metric.name)
        if value is None or score is None:
            continue
        span = row.intervals.get(cost)
        points.append(
            Point(
                label=row.variant,
                cost=value * scale,
                score=score,
                cost_interval=(span[0] * scale, span[1] * scale) if span else None,
                score_interval=_score_interval(row, baseline, metric),
                counted=row.validity.valid or not timed,
                mark=order.index(row.variant),
            )
        )
    return points


def _score_interval(row: VariantResult, baseline: VariantResult | None, metric: Metric) -> Interval | None:
    """The paired interval of what was lost, seen from the baseline's score; that one has none itself.

    It ends where a score cannot be better.
    """
    drop = row.intervals.get(drop_name(metric))
    score = baseline.value(metric.name) if baseline else None
    if drop is None or score is None or row is baseline:
        return None
    sign = -1 if metric.higher_is_better else 1
    ends = sorted(_possible(score + sign * value, metric) for value in drop)
    return ends[0], ends[1]


def _possible(score: float, metric: Metric) -> float:
    if metric.best is None:
        return score
    return min(score, metric.best) if metric.higher_is_better else max(score, metric.best)
