"""What two engines scored on the same samples, as evidence of a drop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from jetway.tasks.errors import ConfigError
from jetway.tasks.metrics import Metric
from jetway.tasks.statistics import Resampled, paired_drop
from jetway.tasks.verdict import Evidence, correctness_evidence, score_evidence

Record = Mapping[str, Any]
Summarize = Callable[[Sequence[Any]], Mapping[str, float]]


@dataclass(frozen=True)
class Scores:
    """What an engine scored, sample by sample, and digests of the engine and of what it was given."""

    records: Sequence[Record]
    engine_sha256: str
    #: Empty in runs that did not keep them yet.
    inputs_sha256: tuple[str, ...] = ()


class PairedScores:
    """Scores of two engines; ``summarize`` is the workload's, and is called only for what is no mean of records."""

    def __init__(self, before: Scores, after: Scores, summarize: Summarize) -> None:
        self.sides = (before, after)
        self._summarize = summarize

    @property
    def why_not(self) -> str:
        """Why the samples of both cannot be paired; empty when they can."""
        before, after = self.sides
        counts = len(before.records), len(after.records)
        if counts[0] != counts[1]:
            return f"other evaluation data: {counts[0]:,} samples and {counts[1]:,}"
        if before.inputs_sha256 and after.inputs_sha256 and before.inputs_sha256 != after.inputs_sha256:
            return "other evaluation data: the inputs differ"
        return "" if counts[0] else "no samples"

    @property
    def same_engine(self) -> bool:
        """Whether both are one engine's, and agree on every sample."""
        before, after = self.sides
        return before.engine_sha256 == after.engine_sha256 and before.records == after.records

    def evidence(
        self, metric: Metric, recorded: tuple[float | None, float | None], margin: float
    ) -> Evidence:
        """By McNemar where the score is a share of right samples, else by bootstrap.

        Raises ConfigError when the records do not give the ``recorded`` values of both sides with today's code.
        """
        means = self._resampled(partial(_mean, metric.name))
        if not _reproduces(means, metric.name, recorded):
            return self._bootstrapped(self._summarized, metric, recorded, margin)
        columns = [side.column(metric.name) for side in means]
        if all(set(column) <= {0, 1} for column in columns):
            return correctness_evidence(
                *(columns if metric.higher_is_better else columns[::-1]), margin=margin
            )
        return self._bootstrapped(means, metric, recorded, margin)

    def _bootstrapped(
        self,
        sides: tuple[Resampled, Resampled],
        metric: Metric,
        recorded: tuple[float | None, float | None],
        margin: float,
    ) -> Evidence:
        if not _reproduces(sides, metric.name, recorded):
            raise ConfigError("the workload's summarize() gives other values than were recorded")
        drop, interval = paired_drop(*sides, metric.name, higher_is_better=metric.higher_is_better)
        before, after = (side.records for side in sides)
        differing = sum(one != other for one, other in zip(before, after, strict=True))
        return score_evidence(drop, interval, len(before), differing=differing, margin=margin)

    @cached_property
    def _summarized(self) -> tuple[Resampled, Resampled]:
        """Kept, as a workload's summary may be slow and gives all of its metrics at once."""
        return self._resampled(self._summarize)

    def _resampled(self, summarize: Summarize) -> tuple[Resampled, Resampled]:
        before, after = self.sides
        return Resampled(before.records, summarize), Resampled(after.records, summarize)


def _reproduces(
    sides: tuple[Resampled, Resampled], name: str, recorded: tuple[float | None, float | None]
) -> bool:
    """Whether the records give the recorded values, so that resamples of them mean the same."""
    return all(
        value is not None and math.isclose(side.summary.get(name, math.nan), value, abs_tol=1e-9)
        for side, value in zip(sides, recorded, strict=True)
    )


def _mean(name: str, records: Sequence[Record]) -> dict[str, float]:
    """Empty where not every record has such a number."""
    values = [record.get(name) for record in records]
    numbers = [value for value in values if isinstance(value, (int, float))]
    return {name: sum(numbers) / len(numbers)} if len(numbers) == len(values) else {}
