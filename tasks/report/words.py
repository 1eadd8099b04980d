"""Numbers and changes as people say them."""

from __future__ import annotations

import math
from datetime import datetime

from jetway.tasks.results import Interval

#: Below this relative difference two figures are told as the same.
NOTICEABLE = 0.005
#: Metrics whose names in MLflow are no words.
METRICS = {"macs": "MACs", "size_bytes": "size", "latency_ms_p50": "median latency"}
#: A smaller figure is written with an exponent.
SMALLEST_DECIMALS = 7


def number(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(decimals, 0)}f}" if decimals <= SMALLEST_DECIMALS else f"{value:.2e}"


def fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def interval_text(interval: Interval | None, decimals: int = 3) -> str:
    """``[0.461, 0.465]``, or nothing."""
    if interval is None:
        return ""
    return f"[{interval[0]:.{decimals}f}, {interval[1]:.{decimals}f}]".replace("-", "−")


def times(ratio: float) -> str:
    """A ratio above 1 as a factor: ``6.5×``, ``1.04×``, ``23×``."""
    return f"{ratio:.{0 if ratio >= 20 else 1 if ratio >= 2 else 2}f}×"


def factor(ratio: float, less: str, more: str) -> str:
    """What a ratio to the baseline means: ``6.5× faster`` (of 0.153), ``1.2× slower``, ``the same``."""
    if abs(ratio - 1) < NOTICEABLE or ratio <= 0:
        return "the same"
    return f"{times(1 / ratio)} {less}" if ratio < 1 else f"{times(ratio)} {more}"


def factor_span(interval: Interval) -> str:
    """The interval of a ratio as that of its factor: ``6.5× to 6.8×``, ``2.8×`` where the ends read the same."""
    low, high = interval
    ends = (1 / high, 1 / low) if high < 1 else (low, high)
    return " to ".join(dict.fromkeys(times(end) for end in ends))


def listed(names: list[str], limit: int = 4) -> str:
    """``a, b and c``; of many the first ones and how many more."""
    if len(names) > limit:
        return f"{', '.join(names[:limit])} and {len(names) - limit} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def shortened(name: str, limit: int = 32) -> str:
    """A long name without its middle."""
    half = limit // 2
    return name if len(name) <= limit else f"{name[:half]}…{name[-half + 1 :]}"


def count_of(count: int, noun: str) -> str:
    """``1 gate``, ``3 gates``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def metric_words(name: str) -> str:
    return METRICS.get(name, name)


def day_and_time(moment: datetime) -> str:
    return f"{moment:%-d %B %Y, %H:%M %Z}"
