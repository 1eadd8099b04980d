"""The series of nightly figures of a recipe on a target, and where it moved to another level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from jetway.tasks.change_points import ChangePoint, change_points
from jetway.tasks.results import Interval
from jetway.tasks.tracking.values import RunRecord

#: Nights that a chart shows at most.
NIGHTS_SHOWN = 90


@dataclass(frozen=True)
class NightPoint:
    """One night's figure, with its 95 % interval where it has one."""

    at: datetime
    value: float
    interval: Interval | None
    board: str
    verdict: str
    variant: str


@dataclass(frozen=True)
class Series:
    """One metric of a recipe on a target, oldest night first; a night without the figure is left out."""

    metric: str
    points: tuple[NightPoint, ...]
    changes: tuple[ChangePoint, ...] = ()

    @property
    def boards(self) -> list[str]:
        return list(dict.fromkeys(point.board for point in self.points))

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(point.variant for point in self.points))


def read_series(comparisons: Sequence[RunRecord], metrics: Sequence[str]) -> list[Series]:
    """A series a metric, of the runs of nightly comparisons as MLflow gives them, newest first."""
    return [found for metric in metrics if (found := _series(comparisons[::-1], metric)).points]


def _series(oldest_first: Sequence[RunRecord], metric: str) -> Series:
    points = tuple(_point(run, metric) for run in oldest_first if metric in run.metrics)
    return Series(metric, points, tuple(change_points([point.value for point in points])))


def _point(run: RunRecord, metric: str) -> NightPoint:
    value = run.metrics[metric]
    low, high = (run.metrics.get(f"{metric}.{end}", value) for end in ("low", "high"))
    return NightPoint(
        at=datetime.fromtimestamp(run.started_ms / 1000, UTC),
        value=value,
        interval=None if low == high else (low, high),
        board=run.tags.get("board", ""),
        verdict=run.tags.get("verdict", ""),
        variant=run.tags.get("variant", ""),
    )
