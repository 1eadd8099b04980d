"""Two stored runs side by side: what differs of each variant on each target, and what can be said of it.

Stored runs were not measured in turns. What a machine does between two sessions passes for a change of the engine,
so their times get no verdict before ``duel`` has measured them in turns; networks and files are compared exactly, and
scores by the samples that both saw.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pydantic import BaseModel, ConfigDict, Field

from jetway.tasks.duel import METRIC, DuelResult
from jetway.tasks.errors import ConfigError, JetwayError
from jetway.tasks.gates import EXIT_GATE_MISSED, EXIT_NO_VERDICT, EXIT_PASSED
from jetway.tasks.metrics import Metric
from jetway.tasks.paired_scores import PairedScores, Scores, Summarize
from jetway.tasks.results import VariantResult
from jetway.tasks.verdict import (
    Change,
    Evidence,
    MetricVerdict,
    judge,
    overall,
)

#: Read off the network and the engine's file, without noise.
EXACT_METRICS = ("params", "macs", "size_bytes")
#: What of an exact figure does not matter, as a share: some builders pad their files.
EXACT_MARGIN = 0.01
#: Why two stored times support no verdict.
NOT_IN_TURNS = "not measured in turns"
#: Why there is nothing to measure.
SAME_ENGINE = "the same engine file"
EXIT_CODES = {Change.REGRESSED: EXIT_GATE_MISSED, Change.UNKNOWN: EXIT_NO_VERDICT}


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ComparedMetric(_Value):
    """One metric of both runs."""

    metric: str
    before: float | None
    after: float | None
    change: Change
    reason: str = Field(default="", description="Why there is no verdict, or what else it rests on.")
    evidence: Evidence | None = Field(default=None, description="Where the samples of both could be paired.")


class ComparedRow(_Value):
    """One variant on one target in both runs."""

    variant: str
    target: str
    simulated: bool = Field(description="In either run: its figures say nothing of a device.")
    metrics: tuple[ComparedMetric, ...]


@dataclass(frozen=True)
class RowPair:
    """The same variant on the same target in both runs, with its scores."""

    before: VariantResult
    after: VariantResult
    scores: tuple[Scores, Scores]


def select_rows(rows: Sequence[VariantResult], variants: Sequence[str]) -> list[VariantResult]:
    """The rows whose variant fits one of the patterns, all of them without patterns. Raises ConfigError for none."""
    found = [row for row in rows if not variants or any(fnmatchcase(row.variant, one) for one in variants)]
    if not found:
        names = ", ".join(dict.fromkeys(row.variant for row in rows))
        raise ConfigError(f"No variant of the run fits {', '.join(variants)}. It has {names}.")
    return found


def match_rows(
    before: Sequence[VariantResult], after: Sequence[VariantResult]
) -> tuple[list[tuple[VariantResult, VariantResult]], list[str]]:
    """Rows of the same variant and target, and a line for each row that only one run has.

    Raises ConfigError when the runs have no row in common.
    """
    first, second = ({f"{row.variant} on {row.target}": row for row in rows} for rows in (before, after))
    common = [(row, second[name]) for name, row in first.items() if name in second]
    if not common:
        raise ConfigError(
            f"The runs share no variant on a target: the first has {', '.join(first)}, the second "
            f"{', '.join(second)}. Compare runs of the same variants on the same target."
        )
    alone = [f"only the first run has {name}" for name in first if name not in second]
    return common, alone + [f"only the second run has {name}" for name in second if name not in first]


def compare_rows(
    pairs: Sequence[RowPair],
    task_metrics: Sequence[Metric],
    summarize: Summarize,
    *,
    margin: float,
    names: Sequence[str] = (),
) -> list[ComparedRow]:
    """What changed of each pair's metrics; false alarms are held over all scores together.

    ``margin`` is the smallest drop of a score that must not pass unseen, ``summarize`` the workload's. Without
    ``names`` of metrics, networks, files, the median latency and scores are compared. Raises ConfigError for a name
    that no row has.
    """
    return judge_rows(gather_rows(pairs, task_metrics, summarize, margin=margin, names=names))


def gather_rows(
    pairs: Sequence[RowPair],
    task_metrics: Sequence[Metric],
    summarize: Summarize,
    *,
    margin: float,
    names: Sequence[str] = (),
) -> list[ComparedRow]:
    """As ``compare_rows``, but with scores that have evidence and no verdict yet."""
    scored = {metric.name: metric for metric in task_metrics}
    chosen = _chosen(names, (*EXACT_METRICS, METRIC, *scored), pairs)
    return [
        ComparedRow(
            variant=pair.after.variant,
            target=pair.after.target,
            simulated=pair.before.simulated or pair.after.simulated,
            metrics=tuple(_compared(pair, chosen, scored, summarize, margin)),
        )
        for pair in pairs
    ]


def judge_rows(rows: Sequence[ComparedRow]) -> list[ComparedRow]:
    """The rows with a verdict wherever there is evidence, corrected for all that is judged here together."""
    evidence = {
        (i, one.metric): one.evidence
        for i, row in enumerate(rows)
        for one in row.metrics
        if one.evidence is not None
    }
    verdicts = judge(evidence)
    return [
        row.model_copy(
            update={"metrics": tuple(_judged(one, verdicts.get((i, one.metric))) for one in row.metrics)}
        )
        for i, row in enumerate(rows)
    ]


def with_turns(
    rows: Sequence[ComparedRow], results: Mapping[tuple[str, str], DuelResult]
) -> list[ComparedRow]:
    """The rows with the median latency as it was measured in turns, by variant and target."""
    return [with_duel(row, results[row.variant, row.target]) for row in rows]


def with_duel(row: ComparedRow, result: DuelResult) -> ComparedRow:
    """The row with the median latency as a duel found it."""
    verdict = result.verdict
    latency = ComparedMetric(
        metric=METRIC,
        before=result.p50_ms("champion"),
        after=result.p50_ms("candidate"),
        change=verdict.change,
        reason=verdict.reason,
        evidence=Evidence.model_validate(verdict.model_dump(include=set(Evidence.model_fields))),
    )
    return with_latency(row, latency)


def with_same_engine(row: ComparedRow, latency_ms: float | None) -> ComparedRow:
    """The row where both sides are one engine file on one target, which cannot differ from itself."""
    same = ComparedMetric(
        metric=METRIC, before=latency_ms, after=latency_ms, change=Change.SAME, reason=SAME_ENGINE
    )
    return with_latency(row, same)


def with_latency(row: ComparedRow, latency: ComparedMetric) -> ComparedRow:
    """The row with this in place of its median latency."""
    others = [one for one in row.metrics if one.metric != METRIC]
    return row.model_copy(update={"metrics": (*others, latency)})


def differing_params(
    before: Mapping[str, str], after: Mapping[str, str]
) -> dict[str, tuple[str | None, str | None]]:
    """Params that are not the same in both, by name; None where a run has no such param."""
    names = sorted(before.keys() | after.keys())
    return {
        name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)
    }


def overall_change(rows: Sequence[ComparedRow]) -> Change:
    return overall([one.change for row in rows for one in row.metrics])


def exit_code(change: Change) -> int:
    """1 when something regressed, else 5 when something is UNKNOWN, else 0."""
    return EXIT_CODES.get(change, EXIT_PASSED)


def _chosen(names: Sequence[str], default: Sequence[str], pairs: Sequence[RowPair]) -> list[str]:
    known = {name for pair in pairs for row in (pair.before, pair.after) for name in row.measured()}
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(
                f"No metric {name!r} in these runs.{hint} They have {', '.join(sorted(known))}."
            )
    return [name for name in names or default if name in known]


def _compared(
    pair: RowPair,
    names: Sequence[str],
    scored: Mapping[str, Metric],
    summarize: Summarize,
    margin: float,
) -> list[ComparedMetric]:
    """Every metric of a row, with evidence where there is some, and not judged yet."""
    paired = PairedScores(*pair.scores, summarize)
    return [
        _score(pair, paired, scored[name], margin) if name in scored else _figure(pair, name)
        for name in names
    ]


def _figure(pair: RowPair, name: str) -> ComparedMetric:
    before, after = pair.before.value(name), pair.after.value(name)
    change, reason = Change.UNKNOWN, _why_no_verdict(pair, before, after)
    if name in EXACT_METRICS and before is not None and after is not None:
        change, reason = _exact_change(before, after), ""
    return ComparedMetric(metric=name, before=before, after=after, change=change, reason=reason)


def _exact_change(before: float, after: float) -> Change:
    if math.isclose(before, after, rel_tol=EXACT_MARGIN):
        return Change.SAME
    return Change.REGRESSED if after > before else Change.IMPROVED


def _why_no_verdict(pair: RowPair, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not measured in both"
    invalid = [which for which, row in _sides(pair) if not row.validity.valid]
    if invalid:
        return f"INVALID in {' and '.join(invalid)}"
    boards = {pair.before.board, pair.after.board}
    return "on different boards" if len(boards) > 1 else NOT_IN_TURNS


def _sides(pair: RowPair) -> tuple[tuple[str, VariantResult], tuple[str, VariantResult]]:
    return ("the first run", pair.before), ("the second run", pair.after)


def _score(pair: RowPair, paired: PairedScores, metric: Metric, margin: float) -> ComparedMetric:
    recorded = pair.before.value(metric.name), pair.after.value(metric.name)
    change, reason, evidence = Change.UNKNOWN, paired.why_not, None
    if not reason and paired.same_engine:
        change, reason = Change.SAME, SAME_ENGINE
    elif not reason:
        try:
            evidence = paired.evidence(metric, recorded, margin)
        except JetwayError as exc:
            reason = str(exc)
    return ComparedMetric(
        metric=metric.name,
        before=recorded[0],
        after=recorded[1],
        change=change,
        reason=reason,
        evidence=evidence,
    )


def _judged(compared: ComparedMetric, verdict: MetricVerdict | None) -> ComparedMetric:
    if verdict is None or compared.evidence is None:
        return compared
    evidence = compared.evidence.model_copy(update={"p_value": verdict.p_value})
    return compared.model_copy(
        update={"change": verdict.change, "reason": verdict.reason, "evidence": evidence}
    )
