"""Samples over time: a column for each figure, NaN where it could not be read. Times are the monotonic clock's."""

import array
import bisect
import math
from typing import Dict, List, Optional, Tuple

from jetway.tasks.on_device import statistics, tensors

TIME = "time_s"
NAN = float("nan")

Stats = Dict[str, Optional[float]]


class Series:
    """Columns of the same length, which grow together."""

    def __init__(self) -> None:
        self.times = array.array("d")
        self.columns = {}  # type: Dict[str, array.array[float]]

    def add(self, time_s: float, values: Dict[str, float]) -> None:
        """A sample. A figure that is new had no value before, and one that is missing has none now."""
        for name in values:
            if name not in self.columns:
                self.columns[name] = array.array("d", [NAN] * len(self.times))
        self.times.append(time_s)
        for name, column in self.columns.items():
            column.append(values.get(name, NAN))

    def between(self, start_s: float, end_s: float) -> "Series":
        """The samples from ``start_s`` to ``end_s``, both included."""
        first, last = bisect.bisect_left(self.times, start_s), bisect.bisect_right(self.times, end_s)
        part = Series()
        part.times = self.times[first:last]
        part.columns = {name: column[first:last] for name, column in self.columns.items()}
        return part

    def values(self, name: str) -> List[float]:
        """Those of a column that could be read."""
        return [value for value in self.columns.get(name, ()) if not math.isnan(value)]

    def statistics(self, name: str) -> Stats:
        """``mean``, ``min`` and ``peak`` of a column; None each where it has no value."""
        values = self.values(name)
        if not values:
            return {"mean": None, "min": None, "peak": None}
        return {"mean": sum(values) / len(values), "min": min(values), "peak": max(values)}

    def summary(self) -> Dict[str, Stats]:
        """Statistics of every column that has a value."""
        return {name: self.statistics(name) for name in sorted(self.columns) if self.values(name)}

    def integral(self, name: str, start_s: float, end_s: float) -> Optional[float]:
        """Of a column over that time, its points joined by lines; None where it has no two points.

        Before the first point and after the last the column is taken to stay as it is there.
        """
        points = [point for point in zip(self.times, self.columns.get(name, ())) if not math.isnan(point[1])]
        if len(points) < 2:
            return None
        inside = [point for point in points if start_s < point[0] < end_s]
        cut = [(start_s, at(points, start_s))] + inside + [(end_s, at(points, end_s))]
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2.0 for a, b in zip(cut, cut[1:]))

    def increase(self, name: str, start_s: float, end_s: float) -> Optional[float]:
        """Of a counter over that time; None where it has no two points."""
        points = [point for point in zip(self.times, self.columns.get(name, ())) if not math.isnan(point[1])]
        return at(points, end_s) - at(points, start_s) if len(points) > 1 else None

    def write(self, path: str) -> None:
        with tensors.TensorWriter(path) as writer:
            for name, column in [(TIME, self.times)] + sorted(self.columns.items()):
                writer.add_bytes(name, "F64", [len(column)], statistics.little_endian(column))


def read(path: str) -> Series:
    found = {name: array.array("d", tensor.values()) for name, tensor in tensors.read_tensors(path).items()}
    series = Series()
    series.times = found.pop(TIME)
    series.columns = found
    return series


def at(points: List[Tuple[float, float]], time_s: float) -> float:
    """The value at that time, on the line between the points around it."""
    index = bisect.bisect_left(points, (time_s,))
    if index == 0:
        return points[0][1]
    if index == len(points):
        return points[-1][1]
    (before_s, before), (after_s, after) = points[index - 1], points[index]
    return before + (after - before) * (time_s - before_s) / (after_s - before_s)
