"""Accuracy against a cost: a mark each variant with its intervals, and the Pareto front through the best."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from markupsafe import Markup

from jetway.tasks.metrics import Metric
from jetway.tasks.report.pareto import pareto_front
from jetway.tasks.report.points import Point
from jetway.tasks.report.svg import (
    COLOURS,
    Frame,
    Scale,
    drawing,
    join,
    line,
    marker,
    padded,
    path,
    text,
    watermark,
)
from jetway.tasks.report.words import fraction, listed, number

WIDTH, HEIGHT = 360, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 344, 26, 226
CHARACTER = 6.9  # width of one in a label
Box = tuple[float, float, float, float]


def draw_scatter(
    points: Sequence[Point],
    metric: Metric,
    cost: str,
    *,
    title: str,
    simulated: bool = False,
    beside: Sequence[Point] = (),
) -> Markup:
    """The chart of one target; ``cost`` names the axis with its unit, which has room for the points ``beside`` it too.

    Nothing where there is no point. A hollow mark is not valid, and not considered for the front.
    """
    if not points:
        return Markup("")
    shown = [*points, *beside]
    frame = Frame(_cost_scale(shown), _score_scale(shown))
    front = pareto_front(points, higher_is_better=metric.higher_is_better)
    better = "higher" if metric.higher_is_better else "lower"
    return drawing(
        WIDTH,
        HEIGHT,
        title,
        describe(points, front, metric, cost),
        watermark((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2, shown=simulated),
        frame.axes(f"{cost} (lower is better)", f"{metric.name} ({better} is better)"),
        _front_line(front, frame, higher_is_better=metric.higher_is_better),
        *(_interval_bars(point, frame) for point in points),
        *(_mark(point, frame, _words(point, metric, cost)) for point in points),
        _labels(points, frame),
    )


def describe(points: Sequence[Point], front: Sequence[Point], metric: Metric, cost: str) -> str:
    """The chart in words, for who hears it."""
    told = [_words(point, metric, cost) for point in points]
    best = f"Pareto front: {listed([point.label for point in front], 9)}." if front else "No Pareto front."
    return f"{'; '.join(told)}. {best}"


def _cost_scale(points: Sequence[Point]) -> Scale:
    ends = [end for point in points for end in (point.cost, *(point.cost_interval or ()))]
    low, high = padded([0.0, *ends], share=0.12, floor=0.0)
    return Scale(low, high, LEFT, RIGHT)


def _score_scale(points: Sequence[Point]) -> Scale:
    ends = [end for point in points for end in (point.score, *(point.score_interval or ()))]
    low, high = padded(ends, share=0.12)
    return Scale(low, high, BOTTOM, TOP)


def _front_line(front: Sequence[Point], frame: Frame, *, higher_is_better: bool) -> Markup:
    """Stairs: at every cost the best score that can be had for it, from the cheapest point to the edge."""
    if not front:
        return Markup("")
    worst = frame.y.start if higher_is_better else frame.y.end
    steps = [(frame.x(front[0].cost), worst), _spot(front[0], frame)]
    for before, after in pairwise(front):
        steps += [(frame.x(after.cost), frame.y(before.score)), _spot(after, frame)]
    return path([*steps, (frame.x.end, frame.y(front[-1].score))], "front")


def _spot(point: Point, frame: Frame) -> tuple[float, float]:
    return frame.x(point.cost), frame.y(point.score)


def _interval_bars(point: Point, frame: Frame) -> Markup:
    x, y = _spot(point, frame)
    class_ = f"interval s{point.mark % COLOURS}"
    bars = []
    if point.cost_interval:
        low, high = (frame.x(end) for end in point.cost_interval)
        bars += [
            line(low, y, high, y, class_),
            *(line(end, y - 3, end, y + 3, class_) for end in (low, high)),
        ]
    if point.score_interval:
        low, high = (frame.y(end) for end in point.score_interval)
        bars += [
            line(x, low, x, high, class_),
            *(line(x - 3, end, x + 3, end, class_) for end in (low, high)),
        ]
    return join(bars)


def _mark(point: Point, frame: Frame, hint: str) -> Markup:
    return marker(*_spot(point, frame), point.mark, hollow=not point.counted, hint=hint)


def _words(point: Point, metric: Metric, cost: str) -> str:
    invalid = "" if point.counted else ", not valid"
    return f"{point.label}: {number(point.cost)} {cost}, {metric.name} {fraction(point.score)}{invalid}"


def _labels(points: Sequence[Point], frame: Frame) -> Markup:
    """Names in the colour of their marks, beside them where there is room; the legend has all of them."""
    spots = [_spot(point, frame) for point in points]
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in spots]
    found = []
    for point, spot in zip(points, spots, strict=True):
        placed = _room(point.label, spot, taken)
        if placed is not None:
            box, x, y, anchor = placed
            taken.append(box)
            found.append(text(x, y, point.label, f"label f{point.mark % COLOURS}", anchor=anchor))
    return join(found)


def _room(
    label: str, spot: tuple[float, float], taken: Sequence[Box]
) -> tuple[Box, float, float, str] | None:
    """A free place beside the mark: the box of the words, where they are written, and their anchor."""
    x, y = spot
    width = len(label) * CHARACTER
    for dx, dy, anchor in ((10, 4, "start"), (-10, 4, "end"), (9, -11, "start"), (9, 20, "start"),
                           (-9, -11, "end"), (-9, 20, "end"), (0, -13, "middle"), (0, 22, "middle")):  # fmt: skip
        left = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
        box = (left, y + dy - 11, left + width, y + dy + 3)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 8 and box[3] <= BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            return box, x + dx, y + dy, anchor
    return None


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
