"""What a night says of each recipe on each target: verdicts against the champion, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from jetway.tasks.artifacts import SCHEMA_VERSION
from jetway.tasks.comparison import EXACT_METRICS, ComparedMetric, ComparedRow, exit_code, overall_change
from jetway.tasks.comparison_table import comparison_texts
from jetway.tasks.duel import METRIC
from jetway.tasks.gates import EXIT_GATE_MISSED, EXIT_NO_VERDICT, EXIT_PASSED, gates_exit_code
from jetway.tasks.metrics import Metric
from jetway.tasks.results import TIMING_PREFIXES, VariantResult
from jetway.tasks.tracking.registry import Champion, model_name
from jetway.tasks.verdict import Change

#: The worst first: what got worse, then what could not run, then what is not known.
EXIT_ORDER = (EXIT_GATE_MISSED, 4, 3, 2, 6, EXIT_NO_VERDICT, EXIT_PASSED)


class Policy(StrEnum):
    """When a candidate becomes champion without being asked."""

    NEVER = "never"
    ON_IMPROVEMENT = "on-improvement"
    BY_HAND = "by-hand"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NightRow(_Value):
    """One recipe on one target; without a target where the recipe cannot be read."""

    recipe: str
    target: str
    target_class: str
    run_id: str = Field(default="", description="Of the candidate's pipeline run.")
    candidate: VariantResult | None = Field(default=None, description="None where the deployment failed.")
    task_metrics: tuple[Metric, ...] = ()
    champion: Champion | None = Field(default=None, description="What it was held against.")
    compared: ComparedRow | None = Field(default=None, description="None without a champion.")
    notes: tuple[str, ...] = Field(default=(), description="What else a reader of the verdict should know.")
    error: str = Field(default="", description="Why there is no verdict at all.")
    error_exit_code: int = 4
    promoted: Champion | None = Field(default=None, description="What the candidate became.")

    @property
    def name(self) -> str:
        return f"{self.recipe} on {self.target}" if self.target else self.recipe

    @property
    def model(self) -> str:
        """The registered model whose champion it shares with all targets of its class."""
        return model_name(self.recipe, self.target_class)

    @property
    def status(self) -> str:
        """A change by its name, FAILED, or NEW where there was no champion."""
        if self.error or self.candidate is None:
            return "FAILED"
        return str(overall_change([self.compared])) if self.compared else "NEW"

    @property
    def exit_code(self) -> int:
        if self.error or self.candidate is None:
            return self.error_exit_code
        codes = [gates_exit_code([self.candidate])]
        if self.compared:
            codes.append(exit_code(overall_change([self.compared])))
        return worst_exit_code(codes)

    @property
    def sentence(self) -> str:
        """What to know of it in a line."""
        return f"{self.status}: {self.name}{_because(self)}"


class NightResult(_Value):
    """What the flow returns, and what ``--json`` prints."""

    schema_version: int = SCHEMA_VERSION
    run_id: str = Field(description="Of the night's own run in MLflow.")
    rows: tuple[NightRow, ...]

    @property
    def exit_code(self) -> int:
        return worst_exit_code([row.exit_code for row in self.rows])

    @property
    def is_red(self) -> bool:
        """Whether something got worse or failed, rather than stayed unknown."""
        return self.exit_code not in (EXIT_PASSED, EXIT_NO_VERDICT)

    @property
    def message(self) -> str:
        """Every recipe and target that is not well, the worst first; else that all is well."""
        unwell = [row for row in self.rows if row.exit_code != EXIT_PASSED]
        unwell.sort(key=lambda row: EXIT_ORDER.index(row.exit_code))
        return "; ".join(row.sentence for row in unwell) or "Nothing is worse than the champions."

    def compared(self) -> list[ComparedRow]:
        """Every row with a verdict, the recipe in its name."""
        return [
            row.compared.model_copy(update={"variant": f"{row.recipe} {row.compared.variant}"})
            for row in self.rows
            if row.compared
        ]


def worst_exit_code(codes: Sequence[int]) -> int:
    return min(codes, key=EXIT_ORDER.index, default=EXIT_PASSED)


def may_be_promoted(row: NightRow, policy: Policy) -> bool:
    """Whether the policy moves the alias: to what passed its gates, is VALID, and is better than what was there.

    Where nothing was there, being sound is enough.
    """
    if policy is not Policy.ON_IMPROVEMENT or row.candidate is None or row.exit_code != EXIT_PASSED:
        return False
    return row.champion is None or row.status == Change.IMPROVED


def to_promote(rows: Sequence[NightRow], policy: Policy) -> list[NightRow]:
    """The rows whose candidates become champions: one of those that share a champion, where all of them passed."""
    unsound = {row.model for row in rows if row.exit_code != EXIT_PASSED}
    first: dict[str, NightRow] = {}
    for row in rows:
        if row.model not in unsound and may_be_promoted(row, policy):
            first.setdefault(row.model, row)
    return list(first.values())


def why_not_promoted(row: NightRow, rows: Sequence[NightRow], policy: Policy) -> str:
    """What another target of its class has to do with that this row was not promoted; empty where nothing."""
    sharing = [other for other in rows if other.model == row.model and other is not row]
    if moved := next((other for other in sharing if other.promoted), None):
        return f"not promoted: {moved.name} was, and the class {row.target_class} has one champion"
    unsound = [f"{other.name} is {other.status}" for other in sharing if other.exit_code != EXIT_PASSED]
    if unsound and may_be_promoted(row, policy):
        return f"not promoted: the class {row.target_class} has one champion, and {', '.join(unsound)}"
    return ""


def how_to_promote(row: NightRow) -> str:
    """The command that moves the alias to this row's candidate."""
    assert row.candidate is not None
    return f"jetway promote {row.run_id[:8]} --target {row.target} --variant {row.candidate.variant}"


def night_figures(row: NightRow) -> dict[str, float]:
    """What a night adds to the history of a recipe on a target; times only of a session that is VALID.

    The ends of a figure's 95 % interval have its name and ``.low`` and ``.high``.
    """
    if row.candidate is None:
        return {}
    figures: dict[str, float] = {}
    for name in (*EXACT_METRICS, METRIC, *(metric.name for metric in row.task_metrics)):
        value = row.candidate.value(name)
        if value is None or (name.startswith(TIMING_PREFIXES) and not row.candidate.validity.valid):
            continue
        low, high = row.candidate.intervals.get(name, (value, value))
        figures |= {name: value, f"{name}.low": low, f"{name}.high": high}
    return figures


def night_markdown(rows: Sequence[NightRow]) -> str:
    """A heading and a table of verdicts for each row, the worst first."""
    ordered = sorted(rows, key=lambda row: EXIT_ORDER.index(row.exit_code))
    return "\n\n".join(row_markdown(row) for row in ordered)


def row_markdown(row: NightRow) -> str:
    """What the night says of one recipe on one target."""
    parts = [f"## {row.status}: {row.name}"]
    if row.champion:
        parts.append(f"Against {row.champion.title}.")
    if row.compared:
        parts.append(_table(row.compared))
    parts += [f"- {note}" for note in (*row.notes, *filter(None, [row.error, _promotion(row)]))]
    return "\n\n".join(parts)


def _table(compared: ComparedRow) -> str:
    lines = [
        "| metric | champion | tonight | change | 95 % | verdict | why |",
        "| :-- | --: | --: | --: | --: | :-- | :-- |",
    ]
    for metric in compared.metrics:
        cells = (*comparison_texts(metric), metric.change, metric.reason.replace("|", "/"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _promotion(row: NightRow) -> str:
    return f"promoted: {row.promoted.title} is the champion now" if row.promoted else ""


def _because(row: NightRow) -> str:
    """What decided the status, in brackets."""
    if row.error or row.candidate is None:
        return f" ({row.error})"
    told = [_metric_text(one) for one in _deciding(row)]
    gates = [gate for gate in row.candidate.gates if not gate.passed]
    told += [f"gate {gate.name} {gate.verdict}" for gate in gates]
    told += [] if row.candidate.validity.valid else ["tonight's session is INVALID"]
    return f" ({', '.join(told)})" if told else ""


def _deciding(row: NightRow) -> list[ComparedMetric]:
    metrics = row.compared.metrics if row.compared else ()
    return [one for one in metrics if str(one.change) == row.status and one.change is not Change.SAME]


def _metric_text(metric: ComparedMetric) -> str:
    name, before, after, change, interval = comparison_texts(metric)
    if metric.change is Change.UNKNOWN:
        return f"{name}: {metric.reason}"
    return f"{name} {before} → {after}, {change}{f' {interval}' if interval else ''}"
