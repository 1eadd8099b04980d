"""SVG as text: elements whose values are escaped, scales, ticks, and the frame that charts are drawn in.

Colours are classes that the page's style sheet defines, so that one drawing serves light and dark. A unit is
a pixel where the chart is shown at its own width, as on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

#: Variants that look different: colours repeat after COLOURS, shapes after the number of SHAPES.
COLOURS = 7


def element(name: str, *children: str, **attributes: str | float) -> Markup:
    """``element("line", x1=0, class_="axis")``. Text among the children is escaped, Markup is not."""
    given = "".join(f' {_attribute(key)}="{_value(value)}"' for key, value in attributes.items())
    inner = "".join(escape(child) for child in children)
    return Markup(f"<{name}{given}>{inner}</{name}>" if inner else f"<{name}{given}/>")


def join(parts: Iterable[str]) -> Markup:
    return Markup("").join(parts)


def drawing(width: float, height: float, title: str, description: str, *content: str) -> Markup:
    """A whole picture, with what a screen reader says of it."""
    told = f"{title}. {description}"
    shape = f"0 0 {_value(width)} {_value(height)}"
    return element("svg", *content, viewBox=shape, role="img", aria_label=told, class_="chart")


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def text(x: float, y: float, words: str, class_: str = "", *, anchor: str = "start") -> Markup:
    return element("text", words, x=x, y=y, class_=class_, text_anchor=anchor)


def watermark(x: float, y: float, *, shown: bool) -> Markup:
    """Behind a chart whose figures are no device's; nothing where they are."""
    return text(x, y, "SIMULATED", "watermark", anchor="middle") if shown else Markup("")


def tick_labels(scale: Scale, y: float) -> list[Markup]:
    """The ticks of an axis to the right, in figures under it."""
    ticks = scale.ticks()
    return [
        text(scale(value), y, label, anchor="middle")
        for value, label in zip(ticks, tick_texts(ticks), strict=True)
    ]


def path(points: Iterable[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
    steps = "L".join(f"{_value(x)} {_value(y)}" for x, y in points)
    return element("path", d=f"M{steps}{'Z' if closed else ''}", class_=class_)


def marker(
    x: float, y: float, index: int, *, hollow: bool = False, hint: str = "", size: float = 5
) -> Markup:
    """The mark of the variant of that index: its colour and, for those who do not tell colours, its shape."""
    outline = SHAPES[index % len(SHAPES)]
    spots = [(x + dx * size, y + dy * size) for dx, dy in outline]
    steps = "L".join(f"{_value(px)} {_value(py)}" for px, py in spots)
    class_ = f"mark c{index % COLOURS}{' hollow' if hollow else ''}"
    return element("path", *([element("title", hint)] if hint else []), d=f"M{steps}Z", class_=class_)


def swatch(index: int, *, hollow: bool = False) -> Markup:
    """The mark of the variant of that index, for a legend."""
    return _in_legend(marker(7, 7, index, hollow=hollow, size=4.5))


def box(index: int) -> Markup:
    """The colour of that index, for a legend of parts of a bar."""
    return _in_legend(element("rect", x=2, y=2, width=10, height=10, class_=f"f{index % COLOURS}"))


def _in_legend(mark: Markup) -> Markup:
    return element("svg", mark, viewBox="0 0 14 14", aria_hidden="true")


def _regular(corners: int, turn: float, radius: float) -> tuple[tuple[float, float], ...]:
    angles = [turn + 2 * math.pi * index / corners for index in range(corners)]
    return tuple((radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles)


#: Outlines of about the same area: circle, square, triangle, diamond, and the triangle upside down.
SHAPES = (
    _regular(24, 0, 1.0),
    _regular(4, math.pi / 4, 1.25),
    _regular(3, 0, 1.5),
    _regular(4, 0, 1.35),
    _regular(3, math.pi, 1.5),
)


@dataclass(frozen=True)
class Scale:
    """Maps values from ``low`` to ``high`` on pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        share = (self._along(value) - self._along(self.low)) / (
            self._along(self.high) - self._along(self.low)
        )
        return self.start + share * (self.end - self.start)

    def _along(self, value: float) -> float:
        return math.log(value) if self.log else value

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the scale, about so many."""
        return log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def padded(
    values: Iterable[float], *, share: float = 0.08, floor: float | None = None
) -> tuple[float, float]:
    """The range of the values with some air around it, also where they are all the same; not below ``floor``."""
    known = list(values)
    low, high = min(known), max(known)
    air = (high - low) * share or abs(high) * share or share
    return (low - air if floor is None else max(floor, low - air)), high + air


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.7)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """1, 2 and 5 times powers of ten, or powers of ten alone where those are enough."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in found if low <= value <= high]
        if len(inside) >= min(count, 3):
            return inside
    return linear_ticks(low, high, count)


def tick_texts(values: list[float]) -> list[str]:
    """The ticks with as many decimals as tell them apart, the same for all of a linear axis."""
    steps = [after - before for before, after in pairwise(values)]
    if not steps or max(steps) > 1.5 * min(steps):
        return [f"{value:g}" for value in values]
    decimals = max(0, -math.floor(math.log10(min(steps)) + 1e-9))
    return [f"{value + 0.0:.{decimals}f}" for value in values]


@dataclass(frozen=True)
class Frame:
    """The axes of a chart with a cost to the right and a score upwards."""

    x: Scale
    y: Scale

    def axes(self, x_title: str, y_title: str) -> Markup:
        right, bottom = self.x.end, self.y.start
        parts = [line(self.x(value), bottom, self.x(value), bottom + 4, "axis") for value in self.x.ticks()]
        parts += tick_labels(self.x, bottom + 17)
        parts += [self.upright(y_title), text(right, bottom + 34, x_title, anchor="end")]
        return join(parts)

    def upright(self, y_title: str) -> Markup:
        """The grid of the score, its figures and name, and the line under it."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        across = self.y.ticks()
        parts = [line(left, self.y(value), right, self.y(value), "grid") for value in across]
        parts += [
            text(left - 6, self.y(value) + 4, label, anchor="end")
            for value, label in zip(across, tick_texts(across), strict=True)
        ]
        return join([*parts, line(left, bottom, right, bottom, "axis"), text(4, top - 12, y_title)])


def _attribute(key: str) -> str:
    """``class_`` → class, ``text_anchor`` → text-anchor."""
    return key.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
