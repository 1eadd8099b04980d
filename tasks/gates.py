"""Gates: a recipe's limits against what was measured. Validity, gate and verdict are three things."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from jetway.configs.schema import Gate
from jetway.tasks.errors import ConfigError
from jetway.tasks.results import BASELINE, TIMING_PREFIXES, GateVerdict, Interval, VariantResult, Verdict

EXIT_PASSED = 0
EXIT_GATE_MISSED = 1
EXIT_NO_VERDICT = 5


def check_gate_metrics(gates: Iterable[Gate], known: Collection[str], variants: Collection[str]) -> None:
    """Refuses a gate that could never be decided, before anything runs.

    ``known`` are the metric names of a row (``results.metric_names``), ``variants`` the recipe's.
    Raises ConfigError with the nearest name that exists.
    """
    for gate in gates:
        if gate.metric not in known:
            raise ConfigError(_unknown_metric(gate, known))
        if not any(fnmatchcase(name, gate.variant) for name in variants):
            raise ConfigError(
                f"gates: {gate.name!r}: no variant of the recipe matches {gate.variant!r}. "
                f"Its variants are {', '.join(variants)}."
            )


def evaluate_gates(rows: Sequence[VariantResult], gates: Sequence[Gate]) -> list[VariantResult]:
    """The rows with a verdict for each gate that matches their variant.

    Raises ConfigError when a gate's metric is in no row at all.
    """
    known = {name for row in rows for name in row.metrics}
    for gate in gates:
        if gate.metric not in known:
            raise ConfigError(_unknown_metric(gate, known))
    return [row.model_copy(update={"gates": _verdicts(row, gates)}) for row in rows]


def gates_exit_code(rows: Iterable[VariantResult]) -> int:
    """1 when a gate failed, else 5 when one is UNKNOWN or a measurement INVALID, else 0."""
    rows = list(rows)
    verdicts = {gate.verdict for row in rows for gate in row.gates}
    if Verdict.FAIL in verdicts:
        return EXIT_GATE_MISSED
    if Verdict.UNKNOWN in verdicts or not all(row.validity.valid for row in rows):
        return EXIT_NO_VERDICT
    return EXIT_PASSED


def worst_exit_code(codes: Iterable[int]) -> int:
    """Of several targets, each with the exit code of its gates."""
    given = set(codes)
    return next((code for code in (EXIT_GATE_MISSED, EXIT_NO_VERDICT) if code in given), EXIT_PASSED)


def winner(rows: Iterable[VariantResult]) -> VariantResult | None:
    """What to deploy of one target's rows: the fastest at the median whose gates did not fail.

    The baseline wins only when nothing else is left; None when every row failed a gate.
    """
    candidates = [row for row in rows if all(gate.verdict is not Verdict.FAIL for gate in row.gates)]
    return min(candidates, key=lambda row: (row.variant == BASELINE, _latency_ms(row)), default=None)


def _latency_ms(row: VariantResult) -> float:
    latency_ms = row.value("latency_ms_p50")
    return math.inf if latency_ms is None else latency_ms


def _verdicts(row: VariantResult, gates: Iterable[Gate]) -> tuple[GateVerdict, ...]:
    return tuple(_verdict(row, gate) for gate in gates if fnmatchcase(row.variant, gate.variant))


def _verdict(row: VariantResult, gate: Gate) -> GateVerdict:
    value, interval = row.value(gate.metric), row.intervals.get(gate.metric)
    return GateVerdict(
        name=gate.name,
        metric=gate.metric,
        limit=gate.limit,
        value=value,
        interval=interval,
        verdict=Verdict.UNKNOWN if _says_nothing(row, gate.metric) else _decide(gate, value, interval),
    )


def _says_nothing(row: VariantResult, metric: str) -> bool:
    """An invalid session is not a slow one: its times neither pass nor fail."""
    return not row.validity.valid and metric.startswith(TIMING_PREFIXES)


def _decide(gate: Gate, value: float | None, interval: Interval | None) -> Verdict:
    if value is None:
        return Verdict.UNKNOWN
    sides = {_holds(gate, edge) for edge in interval or (value,)}
    if len(sides) > 1:
        return Verdict.UNKNOWN
    return Verdict.PASS if sides.pop() else Verdict.FAIL


def _holds(gate: Gate, value: float) -> bool:
    return value <= gate.limit if gate.op == "<=" else value >= gate.limit


def _unknown_metric(gate: Gate, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(gate.metric, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"gates: {gate.name!r}: no metric {gate.metric!r}.{hint} There are {', '.join(sorted(known))}."
