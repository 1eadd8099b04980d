"""Two engines measured in turns on one target until a verdict on their latency stands, or the budget is spent.

A run is a process of its own that loads one engine, warms it up and times it beside the canary. Runs come in pairs,
one of each side, whose order is drawn: what drifts or comes by turns on the machine then favours neither side. What
counts of a run is its latency as a multiple of the canary's, which takes the machine's mood out of it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from jetway.tasks.artifacts import SCHEMA_VERSION
from jetway.tasks.measurement import BenchmarkResult
from jetway.tasks.results import Validity
from jetway.tasks.verdict import (
    LATENCY_MARGIN,
    LOOKS,
    Change,
    MetricVerdict,
    judge,
    remaining_alpha,
    timing_evidence,
)

Side = Literal["champion", "candidate"]
SIDES: tuple[Side, Side] = ("champion", "candidate")
METRIC = "latency_ms_p50"
#: Measures one engine in a fresh process on the target.
Measure = Callable[[Side], BenchmarkResult]


@dataclass(frozen=True)
class Budget:
    """No pair begins when either is spent. Runs are those of both sides, INVALID ones included."""

    runs: int = 60
    minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.runs < 2 or not self.minutes > 0:
            raise ValueError(f"{self.runs} runs in {self.minutes} minutes have no room for a pair")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DuelRun(_Value):
    side: Side
    pair: int
    ended_s: float = Field(description="Since the first run began.")
    p50_ms: float | None
    canary_p50_ms: float | None
    validity: Validity

    @property
    def canary_multiple(self) -> float | None:
        """The latency in canaries; None for a run that does not count."""
        if not self.validity.valid or self.p50_ms is None or self.canary_p50_ms is None:
            return None
        return self.p50_ms / self.canary_p50_ms


class DuelResult(_Value):
    """Every run, those that did not count included, and what they say together."""

    schema_version: int = SCHEMA_VERSION
    target: str
    simulated: bool
    verdict: MetricVerdict
    runs: tuple[DuelRun, ...]
    seconds: float
    seed: int = Field(description="Of the order within the pairs.")

    def p50_ms(self, side: Side) -> float | None:
        """Median over the runs that counted, as it was on the clock."""
        values = [pair[side].p50_ms for pair in counted_pairs(self.runs)]
        return median(value for value in values if value is not None) if values else None


def duel(
    measure: Measure,
    *,
    margin: float = LATENCY_MARGIN,
    budget: Budget | None = None,
    comparisons: int = 1,
    seed: int = 0,
    on_run: Callable[[Sequence[DuelRun]], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> DuelResult:
    """Measures pairs and looks at them when ``verdict.LOOKS`` says, until the change is known or the budget is spent.

    ``comparisons`` is how many duels are read together; each then has that share of the false alarms (Bonferroni).
    Ten pairs can tell a slowdown among up to seven of them, fourteen among up to 24. ``on_run`` is given the runs so
    far after each.
    Raises what ``measure`` raises.
    """
    session = _Duel(measure, budget or Budget(), random.Random(seed), clock, on_run)
    last_look = 0
    while True:
        pairs = session.measure_until_look()
        alpha = remaining_alpha(last_look) if session.spent else LOOKS[len(pairs)]
        verdict = _verdict(pairs, margin, alpha / comparisons)
        if verdict.change is not Change.UNKNOWN or session.spent:
            return session.result(verdict, seed)
        last_look = len(pairs)


def counted_pairs(runs: Sequence[DuelRun]) -> list[dict[Side, DuelRun]]:
    """The runs of each pair in which both sides count."""
    pairs: dict[int, dict[Side, DuelRun]] = {}
    for run in runs:
        if run.canary_multiple is not None:
            pairs.setdefault(run.pair, {})[run.side] = run
    return [pair for pair in pairs.values() if len(pair) == len(SIDES)]


class _Duel:
    """The runs so far, and what is left of the budget."""

    def __init__(
        self,
        measure: Measure,
        budget: Budget,
        orders: random.Random,
        clock: Callable[[], float],
        on_run: Callable[[Sequence[DuelRun]], None] | None,
    ) -> None:
        self.runs: list[DuelRun] = []
        self._measure = measure
        self._budget = budget
        self._orders = orders
        self._clock = clock
        self._on_run = on_run
        self._started_s = clock()
        self._results: list[BenchmarkResult] = []
        self._pair = 0

    @property
    def spent(self) -> bool:
        """Whether no further pair may begin."""
        enough = len(counted_pairs(self.runs)) >= max(LOOKS)
        return enough or len(self.runs) + 2 > self._budget.runs or self._seconds >= self._budget.minutes * 60

    def measure_until_look(self) -> list[dict[Side, DuelRun]]:
        """The pairs that count at the next look, or when the budget is spent."""
        before = len(counted_pairs(self.runs))
        while not self.spent:
            self._measure_pair()
            pairs = counted_pairs(self.runs)
            if len(pairs) > before and len(pairs) in LOOKS:
                break
        return counted_pairs(self.runs)

    def result(self, verdict: MetricVerdict, seed: int) -> DuelResult:
        return DuelResult(
            target=self._results[0].target,
            simulated=any(result.simulated for result in self._results),
            verdict=verdict,
            runs=tuple(self.runs),
            seconds=self._seconds,
            seed=seed,
        )

    @property
    def _seconds(self) -> float:
        return self._clock() - self._started_s

    def _measure_pair(self) -> None:
        """The second run of a pair is spared when the first is INVALID, as the pair cannot count."""
        self._pair += 1
        for side in self._orders.sample(SIDES, 2):
            run = self._measure_one(side)
            if not run.validity.valid:
                return

    def _measure_one(self, side: Side) -> DuelRun:
        result = self._measure(side)
        (measured,) = result.variants.values()
        run = DuelRun(
            side=side,
            pair=self._pair,
            ended_s=self._seconds,
            p50_ms=measured.latency.p50_ms,
            canary_p50_ms=result.canary.p50_ms,
            validity=result.validity,
        )
        self._results.append(result)
        self.runs.append(run)
        if self._on_run:
            self._on_run(self.runs)
        return run


def _verdict(pairs: Sequence[dict[Side, DuelRun]], margin: float, alpha: float) -> MetricVerdict:
    champion, candidate = ([pair[side].canary_multiple for pair in pairs] for side in SIDES)
    return judge({METRIC: timing_evidence(champion, candidate, margin=margin)}, alpha=alpha)[METRIC]
