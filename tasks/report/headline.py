"""What a run comes to, in plain words: one verdict for the run, and one for each target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jetway.tasks.gates import winner
from jetway.tasks.ladder import Rung
from jetway.tasks.metrics import Metric
from jetway.tasks.report.material import baseline_of
from jetway.tasks.report.words import (
    count_of,
    factor,
    factor_span,
    fraction,
    listed,
    number,
)
from jetway.tasks.results import BASELINE, GateVerdict, VariantResult, Verdict, drop_name
from jetway.tasks.table import human_bytes

PASSED, MISSED, UNDECIDED = "good", "bad", "unsure"


@dataclass(frozen=True)
class Tile:
    """One figure that stands out: what it is of, the figure, and what that means."""

    title: str
    figure: str
    meaning: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Headline:
    """A sentence that needs no table, the tone of it, and the figures behind it."""

    sentence: str
    tone: str
    tiles: tuple[Tile, ...] = ()

    @property
    def mark(self) -> str:
        """For those who do not tell colours."""
        return {PASSED: "✓", MISSED: "✗", UNDECIDED: "?"}[self.tone]


def run_headline(
    rows: Sequence[VariantResult], *, failed_targets: int = 0, ladder: Sequence[Rung] = ()
) -> Headline:
    """Of the whole run: whether all gates passed on valid measurements. Of figures that no device gave, that first.

    ``failed_targets`` are those that gave no result.
    """
    told = _judged(rows)
    if ladder and told.tone == MISSED:
        told = _with_ladder(told, rows, ladder)
    if failed_targets:
        told = Headline(f"{count_of(failed_targets, 'target')} gave no result. {told.sentence}", MISSED)
    if not any(row.simulated for row in rows):
        return told
    return Headline(f"Simulated: {told.sentence}", UNDECIDED if told.tone == PASSED else told.tone)


def _with_ladder(told: Headline, rows: Sequence[VariantResult], ladder: Sequence[Rung]) -> Headline:
    """A gate that failed, and what plan B made of it."""
    passed = {target: rung.name for rung in ladder for target in rung.passed}
    missed = {row.target for row in rows for gate in row.gates if gate.verdict is Verdict.FAIL}
    names = listed([f"{name} passed on {target}" for target, name in passed.items()])
    tone = PASSED if missed <= set(passed) else MISSED
    return Headline(f"{told.sentence}. Plan B: {names or 'no fallback passed'}", tone)


def _judged(rows: Sequence[VariantResult]) -> Headline:
    gates = [gate for row in rows for gate in row.gates]
    invalid = list(dict.fromkeys(row.target for row in rows if not row.validity.valid))
    failed = _count(gates, Verdict.FAIL)
    unknown = _count(gates, Verdict.UNKNOWN)
    if failed:
        told = f"{count_of(failed, 'gate')} of {len(gates)} failed: {_named(gates, Verdict.FAIL)}"
        return Headline(told, MISSED)
    if invalid:
        return Headline(f"No verdict on speed: the measurement on {listed(invalid)} is not valid", UNDECIDED)
    if unknown:
        told = f"No verdict: the evidence does not decide {count_of(unknown, 'gate')} of {len(gates)}"
        return Headline(f"{told}: {_named(gates, Verdict.UNKNOWN)}", UNDECIDED)
    if gates:
        whole = {1: "The gate", 2: "Both gates"}.get(len(gates), f"All {len(gates)} gates")
        return Headline(f"{whole} passed, on valid measurements", PASSED)
    return Headline("Measured and valid; the recipe sets no gates", PASSED)


def target_headline(rows: Sequence[VariantResult], metrics: Sequence[Metric]) -> Headline:
    """Of one target: the variant to deploy, and what it gains and loses against the baseline."""
    best, baseline = winner(rows), baseline_of(rows)
    if best is None:
        return Headline("Nothing to deploy here: every variant missed a gate.", MISSED)
    tone = run_headline(rows).tone
    if baseline is None or best.variant == BASELINE:
        others = len(rows) > 1
        sentence = f"{best.variant} {_alone(best, metrics[0])}" + (
            " Every other variant missed a gate." if others else ""
        )
        return Headline(sentence, tone, _tiles(best, baseline, metrics, rows))
    parts = [_speed(best, baseline), _size(best, baseline), _score(best, baseline, metrics[0])]
    sentence = f"{best.variant} against the baseline: {'; '.join(part for part in parts if part)}."
    return Headline(sentence, tone, _tiles(best, baseline, metrics, rows))


def _alone(row: VariantResult, metric: Metric) -> str:
    told = [
        f"takes {number(row.value('latency_ms_p50'))} ms a query" if row.validity.valid else "",
        f"weighs {human_bytes(row.value('size_bytes'))}" if row.value("size_bytes") is not None else "",
        f"scores {metric.name} {fraction(row.value(metric.name))}"
        if row.value(metric.name) is not None
        else "",
    ]
    return f"{listed([part for part in told if part])}."


def _speed(row: VariantResult, baseline: VariantResult) -> str:
    ratio, interval = row.value("latency_p50_ratio"), row.intervals.get("latency_p50_ratio")
    if not row.validity.valid or ratio is None:
        return "speed unknown, as the measurement is not valid" if ratio is not None else ""
    before, after = baseline.value("latency_ms_p50"), row.value("latency_ms_p50")
    if interval and interval[0] <= 1 <= interval[1]:
        return f"as fast, as far as this session can tell ({number(after)} ms and {number(before)} ms)"
    return f"{factor(ratio, 'faster', 'slower')} ({number(after)} ms instead of {number(before)} ms)"


def _size(row: VariantResult, baseline: VariantResult) -> str:
    ratio = row.value("size_ratio")
    if ratio is None:
        return ""
    sizes = f"{human_bytes(row.value('size_bytes'))} instead of {human_bytes(baseline.value('size_bytes'))}"
    return f"{factor(ratio, 'smaller', 'larger')} ({sizes})"


def _score(row: VariantResult, baseline: VariantResult, metric: Metric) -> str:
    drop, interval = row.value(drop_name(metric)), row.intervals.get(drop_name(metric))
    if drop is None:
        return ""
    scores = f"{fraction(row.value(metric.name))} against {fraction(baseline.value(metric.name))}"
    if drop == 0:
        return f"{metric.name} unchanged at {fraction(row.value(metric.name))}"
    if interval and interval[0] <= 0 <= interval[1]:
        return f"{metric.name} {scores}, which this data cannot tell apart"
    return f"{metric.name} {'worse' if drop > 0 else 'better'} by {abs(drop):.4f} ({scores})"


def _tiles(
    row: VariantResult,
    baseline: VariantResult | None,
    metrics: Sequence[Metric],
    rows: Sequence[VariantResult],
) -> tuple[Tile, ...]:
    against = row is not baseline
    return (
        _speed_tile(row, against=against),
        _size_tile(row, against=against),
        _score_tile(row, baseline if against else None, metrics[0]),
        _gates_tile(rows),
        _validity_tile(rows),
    )


def _speed_tile(row: VariantResult, *, against: bool) -> Tile:
    if not row.validity.valid:
        return Tile("A query", "unknown", "measurement not valid", UNDECIDED)
    ratio, interval = row.value("latency_p50_ratio"), row.intervals.get("latency_p50_ratio")
    meaning = ""
    if against and ratio is not None:
        span = f", 95 % interval {factor_span(interval)}" if interval and not _straddles(interval) else ""
        meaning = f"{factor(ratio, 'faster', 'slower')}{span}"
    return Tile("A query, median", f"{number(row.value('latency_ms_p50'))} ms", meaning)


def _size_tile(row: VariantResult, *, against: bool) -> Tile:
    ratio = row.value("size_ratio")
    meaning = factor(ratio, "smaller", "larger") if against and ratio is not None else ""
    return Tile("Engine", human_bytes(row.value("size_bytes")), meaning)


def _score_tile(row: VariantResult, baseline: VariantResult | None, metric: Metric) -> Tile:
    drop, interval = row.value(drop_name(metric)), row.intervals.get(drop_name(metric))
    meaning = f"baseline {fraction(baseline.value(metric.name))}" if baseline else ""
    if baseline and drop and interval and interval[0] <= 0 <= interval[1]:
        meaning += ", not told apart by this data"
    return Tile(metric.name, fraction(row.value(metric.name)), meaning)


def _gates_tile(rows: Sequence[VariantResult]) -> Tile:
    gates = [gate for row in rows for gate in row.gates]
    if not gates:
        return Tile("Gates", "none", "the recipe sets none here")
    passed, failed = _count(gates, Verdict.PASS), _count(gates, Verdict.FAIL)
    tone = MISSED if failed else PASSED if passed == len(gates) else UNDECIDED
    unknown = len(gates) - passed - failed
    missing = [f"{failed} failed"] * bool(failed) + [f"{unknown} undecided"] * bool(unknown)
    return Tile("Gates", f"{passed} of {len(gates)}", ", ".join(missing) or "passed", tone)


def _validity_tile(rows: Sequence[VariantResult]) -> Tile:
    if any(row.simulated for row in rows):
        return Tile("Measurement", "SIMULATED", "no figure here is a device's", UNDECIDED)
    if all(row.validity.valid for row in rows):
        return Tile("Measurement", "valid", "no reason to doubt it", PASSED)
    return Tile("Measurement", "INVALID", "neither slow nor fast: see why below", UNDECIDED)


def _straddles(interval: tuple[float, float]) -> bool:
    return interval[0] <= 1 <= interval[1]


def _named(gates: Sequence[GateVerdict], verdict: Verdict) -> str:
    return listed(list(dict.fromkeys(gate.name for gate in gates if gate.verdict is verdict)), 2)


def _count(gates: Sequence[GateVerdict], verdict: Verdict) -> int:
    return sum(gate.verdict is verdict for gate in gates)
