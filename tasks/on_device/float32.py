"""trtexec's statistics, in the float32 arithmetic that it does them in: its figures to the last digit.

numpy's percentiles are others, and in double precision some of trtexec's land one query further.
"""

import math
import struct
from typing import Dict, Sequence

PERCENTILES = (90, 95, 99)
_FLOAT = struct.Struct("f")

Summary = Dict[str, float]


def rounded(value: float) -> float:
    """To the nearest float32. Sums, products and quotients of two float32 become exactly theirs."""
    (result,) = _FLOAT.unpack(_FLOAT.pack(value))
    return float(result)


def total(ordered: Sequence[float]) -> float:
    """One after the other, in the order given."""
    result = 0.0
    for value in ordered:
        result = rounded(result + value)
    return result


def mean(ordered: Sequence[float]) -> float:
    return rounded(total(ordered) / rounded(len(ordered)))


def median(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return rounded(rounded(ordered[middle - 1] + ordered[middle]) / 2.0)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value that so many percent of the queries do not exceed: an element, never between two."""
    excluded_share = rounded(1.0 - rounded(rounded(percent) / 100.0))
    excluded = int(rounded(excluded_share * rounded(len(ordered))))
    return ordered[max(len(ordered) - 1 - excluded, 0)]


def coefficient_of_variation(ordered: Sequence[float]) -> float:
    """Standard deviation over the mean, as a fraction."""
    average = mean(ordered)
    if average == 0.0:
        return 0.0
    differences = [rounded(value - average) for value in ordered]
    squares = [rounded(difference * difference) for difference in differences]
    deviation = rounded(math.sqrt(mean(squares)))
    return rounded(deviation / average)


def summary(values: Sequence[float]) -> Summary:
    """min, max, mean, median and percentiles in the values' unit, and their variation as a fraction."""
    ordered = sorted(map(rounded, values))
    found = {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean(ordered),
        "median": median(ordered),
        "variation_ratio": coefficient_of_variation(ordered),
    }
    found.update(("p{}".format(percent), percentile(ordered, percent)) for percent in PERCENTILES)
    return found


def throughput_per_s(queries: int, walltime_ms: float) -> float:
    return rounded(rounded(rounded(queries) / walltime_ms) * 1000.0)
