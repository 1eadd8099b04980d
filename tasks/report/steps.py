"""What a frame spends its time on: a bar a variant, cut into the steps that a stream or a cascade measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from markupsafe import Markup

from jetway.tasks.measurement import LatencySummary
from jetway.tasks.report.svg import COLOURS, Scale, drawing, element, join, line, text, tick_labels, watermark
from jetway.tasks.report.words import number, shortened

WIDTH, ROW, TOP, LEFT, RIGHT = 360, 46, 8, 16, 344
BAR = 18

Steps = Mapping[str, LatencySummary]


def draw_steps(
    variants: Mapping[str, Steps],
    steps: Sequence[str],
    whole: str,
    *,
    title: str,
    simulated: bool = False,
    beside: Iterable[Steps] = (),
) -> Markup:
    """Medians of the ``steps`` side by side, and a tick at the median of the ``whole``, which they need not sum up to.

    Nothing where no variant has a median. The axis has room for what is ``beside`` it too.
    """
    told = {name: _medians(found, steps) for name, found in variants.items()}
    wholes = {name: found[whole].p50_ms for name, found in variants.items()}
    lengths = [_length(found, steps, whole) for found in variants.values()]
    if not any(lengths):
        return Markup("")
    longest = max([*lengths, *(_length(found, steps, whole) for found in beside)])
    scale = Scale(0.0, longest * 1.04, LEFT, RIGHT)
    bottom = TOP + ROW * len(told)
    return drawing(
        WIDTH,
        bottom + 40,
        title,
        "; ".join(f"{name}: {_in_words(found, [*steps, whole])}" for name, found in variants.items()) + ".",
        watermark(WIDTH / 2, (TOP + bottom) / 2, shown=simulated),
        _axis(scale, bottom),
        *(
            _bar(name, medians, wholes[name], scale, TOP + ROW * index)
            for index, (name, medians) in enumerate(told.items())
        ),
    )


def _medians(found: Steps, steps: Sequence[str]) -> list[float]:
    return [found[step].p50_ms or 0.0 for step in steps]


def _length(found: Steps, steps: Sequence[str], whole: str) -> float:
    return max(sum(_medians(found, steps)), found[whole].p50_ms or 0.0)


def _axis(scale: Scale, bottom: float) -> Markup:
    parts = [line(scale(value), TOP, scale(value), bottom, "grid") for value in scale.ticks()]
    parts += tick_labels(scale, bottom + 16)
    return join([*parts, text(RIGHT, bottom + 33, "ms at the median (further left is better)", anchor="end")])


def _bar(name: str, medians: Sequence[float], whole_ms: float | None, scale: Scale, top: float) -> Markup:
    starts = [0.0, *accumulate(medians)]
    y = top + 20
    cells = [
        element(
            "rect",
            x=scale(start),
            y=y,
            width=max(scale(start + length) - scale(start), 0.0),
            height=BAR,
            class_=f"step f{index % COLOURS}",
        )
        for index, (start, length) in enumerate(zip(starts, medians, strict=False))
    ]
    mark = (
        [] if whole_ms is None else [line(scale(whole_ms), y - 4, scale(whole_ms), y + BAR + 4, "percentile")]
    )
    total = [text(RIGHT, top + 14, f"{number(whole_ms)} ms end to end", "small", anchor="end")]
    return join([text(LEFT, top + 14, shortened(name), "label"), *total, *cells, *mark])


def _in_words(found: Steps, steps: Sequence[str]) -> str:
    return ", ".join(f"{step.replace('_', ' ')} {number(found[step].p50_ms)} ms" for step in steps)
