"""A figure night by night: marks with intervals, the level between change points, and where it moved."""

from __future__ import annotations

from markupsafe import Markup

from jetway.tasks.change_points import ChangePoint, levels
from jetway.tasks.history import NightPoint, Series
from jetway.tasks.report.svg import (
    Frame,
    Scale,
    drawing,
    join,
    line,
    marker,
    padded,
    swatch,
    text,
    watermark,
)
from jetway.tasks.report.words import number
from jetway.tasks.verdict import Change

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 230, 58, 404, 40, 184
#: Numbers of the marks of a night on which something regressed, and of all others.
REGRESSED_MARK, MARK = 2, 1
DATES_SHOWN = 3


def draw_series(series: Series, title: str, *, simulated: bool = False) -> Markup:
    """The chart of one metric. Nights stand side by side, however many days are between them."""
    points = series.points
    ends = [end for point in points for end in (point.value, *(point.interval or ()))]
    frame = Frame(Scale(-0.5, len(points) - 0.5, LEFT, RIGHT), Scale(*padded(ends), BOTTOM, TOP))
    told = f"{len(points)} nights, the last at {number(points[-1].value)}"
    return drawing(
        WIDTH,
        HEIGHT,
        title,
        f"{told}. {moves_text(series)}",
        watermark((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2, shown=simulated),
        _axes(frame, series),
        *(_change(frame, change) for change in series.changes),
        _levels(frame, series),
        *(_night(frame, index, point) for index, point in enumerate(points)),
    )


def moves_text(series: Series) -> str:
    """Where the series moved, in words."""
    moves = [
        f"{change.change_ratio:+.1%} from {series.points[change.index].at:%-d %b %Y} on".replace("%", " %", 1)
        for change in series.changes
    ]
    return f"Moved by {', '.join(moves)}." if moves else "No change of level found."


def series_key(series: Series) -> tuple[tuple[Markup, str], ...]:
    """The marks that the chart uses."""
    regressed = any(point.verdict == Change.REGRESSED for point in series.points)
    key = [(swatch(MARK), "a night")]
    return (*key, (swatch(REGRESSED_MARK), "a night with a verdict REGRESSED")) if regressed else tuple(key)


def _axes(frame: Frame, series: Series) -> Markup:
    nights = len(series.points)
    shown = sorted({round(i * (nights - 1) / max(DATES_SHOWN - 1, 1)) for i in range(DATES_SHOWN)})
    anchors = {shown[0]: "start", shown[-1]: "end"} if len(shown) > 1 else {}
    dates = [
        text(
            frame.x(index),
            BOTTOM + 17,
            f"{series.points[index].at:%-d %b}",
            anchor=anchors.get(index, "middle"),
        )
        for index in shown
    ]
    return join([frame.upright(series.metric), *dates])


def _change(frame: Frame, change: ChangePoint) -> Markup:
    x = frame.x(change.index - 0.5)
    label = f"{change.change_ratio:+.1%}".replace("%", " %")
    anchor = "end" if x > (LEFT + RIGHT) / 2 else "start"
    return join(
        [
            line(x, TOP, x, BOTTOM, "front"),
            text(x + (4 if anchor == "start" else -4), TOP + 10, label, "label", anchor=anchor),
        ]
    )


def _levels(frame: Frame, series: Series) -> Markup:
    parts = []
    for start, end in levels(len(series.points), series.changes):
        values = [point.value for point in series.points[start:end]]
        y = frame.y(sum(values) / len(values))
        parts.append(line(frame.x(start - 0.4), y, frame.x(end - 0.6), y, "axis"))
    return join(parts)


def _night(frame: Frame, index: int, point: NightPoint) -> Markup:
    x, mark = frame.x(index), REGRESSED_MARK if point.verdict == Change.REGRESSED else MARK
    low, high = point.interval or (point.value, point.value)
    hint = (
        f"{point.at:%-d %B %Y %H:%M}: {number(point.value)}, {point.verdict} ({point.variant}, {point.board})"
    )
    bar = line(x, frame.y(low), x, frame.y(high), f"interval s{mark}")
    return join([bar, marker(x, frame.y(point.value), mark, hint=hint, size=3.5)])
