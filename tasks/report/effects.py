"""What changed, with its interval, beside the margin that still passes for the same: a row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from jetway.tasks.report.svg import (
    Scale,
    drawing,
    element,
    join,
    line,
    marker,
    padded,
    text,
    tick_labels,
    watermark,
)
from jetway.tasks.report.words import shortened
from jetway.tasks.results import Interval

WIDTH, ROW, TOP, LEFT, RIGHT = 360, 42, 8, 16, 344


@dataclass(frozen=True)
class Effect:
    """How much worse something is than before; below 0 it is better."""

    label: str
    verdict: str
    value: float
    interval: Interval | None
    #: Number of the mark, as elsewhere on the page.
    mark: int = 0


def draw_effects(
    effects: Sequence[Effect], margin: float, unit: str, *, title: str, simulated: bool = False
) -> Markup:
    """The chart of one metric; ``unit`` says what an effect is. Nothing without effects."""
    if not effects:
        return Markup("")
    ends = [end for one in effects for end in (one.value, *(one.interval or ()))]
    low, high = padded([*ends, -margin, margin])
    scale = Scale(low, high, LEFT, RIGHT)
    bottom = TOP + ROW * len(effects)
    told = "; ".join(f"{one.label}: {one.value:+.4f}, {one.verdict}" for one in effects)
    left, right = scale(-margin), scale(margin)
    return drawing(
        WIDTH,
        bottom + 40,
        title,
        f"{told}. Margin {margin:g}.",
        element("rect", x=left, y=TOP, width=right - left, height=bottom - TOP, class_="margin"),
        watermark(WIDTH / 2, (TOP + bottom) / 2, shown=simulated),
        _axis(scale, bottom, unit),
        *(_effect(one, scale, TOP + ROW * index) for index, one in enumerate(effects)),
    )


def _axis(scale: Scale, bottom: float, unit: str) -> Markup:
    parts = [line(scale(0), TOP, scale(0), bottom, "axis"), line(LEFT, bottom, RIGHT, bottom, "axis")]
    parts += tick_labels(scale, bottom + 16)
    return join([*parts, text(RIGHT, bottom + 33, f"{unit} (further right is worse)", anchor="end")])


def _effect(one: Effect, scale: Scale, top: float) -> Markup:
    y = top + 30
    bar = []
    if one.interval:
        low, high = (scale(end) for end in one.interval)
        bar = [
            line(low, y, high, y, "percentile"),
            *(line(x, y - 4, x, y + 4, "percentile") for x in (low, high)),
        ]
    return join(
        [
            text(LEFT, top + 16, shortened(one.label), "label"),
            text(RIGHT, top + 16, one.verdict, "small", anchor="end"),
            *bar,
            marker(scale(one.value), y, one.mark),
        ]
    )
