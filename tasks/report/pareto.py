"""The Pareto front: points that no other point beats at both cost and score."""

from __future__ import annotations

from collections.abc import Sequence

from jetway.tasks.report.points import Point


def pareto_front(points: Sequence[Point], *, higher_is_better: bool = True) -> list[Point]:
    """The points that none beats, cheapest first; of equal ones all.

    A point that is not ``counted`` neither joins the front nor beats another.
    """
    counted = [point for point in points if point.counted]
    front = [
        point for point in counted if not any(_beats(other, point, higher_is_better) for other in counted)
    ]
    return sorted(front, key=lambda point: (point.cost, point.score))


def _beats(one: Point, other: Point, higher_is_better: bool) -> bool:
    """At least as good at both, and better at one."""
    gain = one.score - other.score if higher_is_better else other.score - one.score
    saving = other.cost - one.cost
    return gain >= 0 and saving >= 0 and gain + saving > 0
