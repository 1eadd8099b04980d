"""How much each part of a network gives, so that all of them together reach a target at the least damage.

Each part has a curve, measured with nothing else pruned: ratio, damage, and share of the network's MACs saved. At
a price for a saved MAC every part takes the ratio that is worth most to it, which minimizes the damages' sum for
what they save (Everett 1963, Lagrange multipliers; Shoham & Gersho 1988). The price is then searched for which the
network as it is really cut reaches the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Ratios = dict[str, float]

_STEPS_BETWEEN = 4
_BISECTIONS = 12


@dataclass(frozen=True)
class Point:
    """What pruning one part by a ratio does."""

    ratio: float
    damage: float
    saved: float


def allocate(
    curves: Mapping[str, Sequence[Point]], macs_ratio: Callable[[Ratios], float], target: float
) -> Ratios | None:
    """Ratios by part that leave at most ``target`` of the MACs; None where no price is high enough.

    ``macs_ratio`` says what ratios leave of the whole. Between two neighbouring prices the ratios are mixed, so
    that the target is met and not overshot by a whole step of one part.
    """
    fine = {part: _refined(points) for part, points in curves.items()}
    low, high = _price_range(fine)
    if macs_ratio(_taken(fine, high)) > target:
        return None
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if macs_ratio(_taken(fine, middle)) <= target else (middle, high)
    return _mixed(_taken(fine, low), _taken(fine, high), macs_ratio, target)


def _refined(points: Sequence[Point]) -> list[Point]:
    """The curve from a ratio of 0 on, with steps between, and damage that never falls: noise cannot pay."""
    worst, rising = 0.0, [Point(0.0, 0.0, 0.0)]
    for point in sorted(points, key=lambda point: point.ratio):
        worst = max(worst, point.damage)
        rising.append(Point(point.ratio, worst, point.saved))
    between = [
        _blend(one, other, step / _STEPS_BETWEEN)
        for one, other in pairwise(rising)
        for step in range(_STEPS_BETWEEN)
    ]
    return [*between, rising[-1]]


def _blend(one: Point, other: Point, share: float) -> Point:
    return Point(
        one.ratio + share * (other.ratio - one.ratio),
        one.damage + share * (other.damage - one.damage),
        one.saved + share * (other.saved - one.saved),
    )


def _price_range(curves: Mapping[str, Sequence[Point]]) -> tuple[float, float]:
    """Prices at which nearly nothing goes that costs anything, and at which all goes that saves anything."""
    damages = [point.damage for points in curves.values() for point in points if 0 < point.damage < math.inf]
    saved = [point.saved for points in curves.values() for point in points if point.saved > 0]
    worst, least = max(damages, default=1.0), min(saved, default=1.0)
    return min(damages, default=1.0) / 1e3, 1e3 * worst / least


def _taken(curves: Mapping[str, Sequence[Point]], price: float) -> Ratios:
    return {
        part: max(points, key=lambda point: (price * point.saved - point.damage, -point.ratio)).ratio
        for part, points in curves.items()
    }


def _mixed(less: Ratios, more: Ratios, macs_ratio: Callable[[Ratios], float], target: float) -> Ratios:
    def at(share: float) -> Ratios:
        return {part: less[part] + share * (more[part] - less[part]) for part in more}

    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS // 2):
        middle = (low + high) / 2
        low, high = (low, middle) if macs_ratio(at(middle)) <= target else (middle, high)
    return at(high)
