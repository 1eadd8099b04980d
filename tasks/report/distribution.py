"""How long queries took: a histogram of all of them for each variant, one above the other, on one axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from jetway.tasks.report.svg import COLOURS, Scale, drawing, join, line, path, text, tick_labels, watermark
from jetway.tasks.report.words import number, shortened
from jetway.tasks.statistics import MIN_QUERIES, Floats, percentile, supports

WIDTH, ROW, TOP, LEFT, RIGHT = 360, 68, 4, 16, 344
BINS = 95
#: An axis whose ends are further apart than this is logarithmic.
LINEAR_SPAN = 4.0
#: Share of the queries left of the axis' end, where none takes longest to be seen.
SHOWN_PERCENT = 99


def draw_distributions(
    latencies_ms: Mapping[str, Floats],
    *,
    order: Sequence[str],
    title: str,
    simulated: bool = False,
    beside: Iterable[Floats] = (),
) -> Markup:
    """The chart of one target's session, every counted query in it; nothing without queries.

    The axis has room for the queries ``beside`` it too.
    """
    told = {name: values for name, values in latencies_ms.items() if len(values)}
    if not told:
        return Markup("")
    scale = _scale([*told.values(), *(values for values in beside if len(values))])
    bottom = TOP + ROW * len(told)
    rows = [
        _ridge(name, values, scale, TOP + ROW * (index + 1), order.index(name) % COLOURS)
        for index, (name, values) in enumerate(told.items())
    ]
    return drawing(
        WIDTH,
        bottom + 40,
        title,
        "; ".join(f"{name}: {_percentiles_text(values)}" for name, values in told.items()) + ".",
        watermark(WIDTH / 2, (TOP + bottom) / 2, shown=simulated),
        _axis(scale, bottom),
        *rows,
    )


def _scale(columns: Sequence[Floats]) -> Scale:
    """From the fastest query to the slowest variant's 99th percentile; what lies beyond is told in words."""
    low = min(float(values.min()) for values in columns)
    high = max(percentile(values, SHOWN_PERCENT) for values in columns)
    log = high / low > LINEAR_SPAN
    return Scale(low / 1.04, max(high, low * 1.01) * 1.04, LEFT, RIGHT, log)


def _axis(scale: Scale, bottom: float) -> Markup:
    parts = [line(scale(value), TOP, scale(value), bottom, "grid") for value in scale.ticks()]
    parts += tick_labels(scale, bottom + 16)
    words = f"ms a query{', logarithmic' if scale.log else ''} (further left is better)"
    return join([*parts, text(RIGHT, bottom + 33, words, anchor="end")])


def _ridge(name: str, values: Floats, scale: Scale, base: float, colour: int) -> Markup:
    """The name, the histogram, and a tick at each percentile that there are queries enough for."""
    edges = _edges(scale)
    counts = np.histogram(values, edges)[0]
    tall = ROW - 36
    heights = tall * counts / max(counts.max(), 1)
    outline = [(scale(float(edges[0])), base)]
    for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
        outline += [(scale(float(left)), base - height), (scale(float(right)), base - height)]
    outline.append((scale(float(edges[-1])), base))
    beyond = int((values > scale.high).sum())
    return join(
        [
            path(outline, f"ridge f{colour} s{colour}", closed=True),
            line(LEFT, base, RIGHT, base, "axis"),
            *_percentile_ticks(values, scale, base),
            text(LEFT, base - ROW + 16, shortened(name), f"label f{colour}"),
            text(LEFT, base - ROW + 30, _beyond_text(beyond, values), "small"),
        ]
    )


def _edges(scale: Scale) -> Floats:
    space = np.geomspace if scale.log else np.linspace
    return np.asarray(space(scale.low, scale.high, BINS + 1), dtype=np.float64)


def _percentile_ticks(values: Floats, scale: Scale, base: float) -> list[Markup]:
    found = []
    for percent, height in ((50, 14), (90, 10), (99, 7)):
        value = percentile(values, percent)
        if supports(len(values), percent) and value <= scale.high:
            found.append(line(scale(value), base - height, scale(value), base + 3, "percentile"))
    return found


def _beyond_text(beyond: int, values: Floats) -> str:
    """What the axis leaves out, so that no tail is hidden."""
    queries = f"{len(values):,} queries"
    if not beyond:
        return f"{queries}, slowest {number(float(values.max()))} ms"
    return f"{queries}, {beyond:,} beyond the axis, slowest {number(float(values.max()))} ms"


def _percentiles_text(values: Floats) -> str:
    stated = [percent for percent in MIN_QUERIES if supports(len(values), percent)]
    return ", ".join(f"p{percent} {number(percentile(values, percent))} ms" for percent in stated)
