"""What a session needs to know about its own numbers while it runs; the host computes the rest."""

import array
from typing import Any, List, Sequence

# Fewest queries that support a percentile at 99 % confidence when one query may be over the latency:
# LoadGen's early stopping (MLPerf Inference rules) with d = 0, c = 0.99, t = 1.
MIN_QUERIES = {90: 64, 95: 130, 99: 662}


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return float(ordered[middle])
    return (ordered[middle - 1] + ordered[middle]) / 2.0


def drift_ratio(values: Sequence[float]) -> float:
    """Change of the median from the first third to the last, whatever its direction: 0.10 is 10 %.

    Below three values there is no third to compare, and the drift is 0.
    """
    third = len(values) // 3
    if third == 0:
        return 0.0
    first, last = median(values[:third]), median(values[-third:])
    return max(first, last) / min(first, last) - 1.0


def relative_medians(medians: Sequence[float], canary_medians: Sequence[float]) -> List[float]:
    """A variant's median against the canary's in the same round: what moves both is gone."""
    return [value / canary for value, canary in zip(medians, canary_medians)]


def little_endian(values: "array.array[Any]") -> bytes:
    import sys

    if sys.byteorder == "big":
        values = array.array(values.typecode, values)
        values.byteswap()
    return values.tobytes()
