"""The ladder of a run: each fallback that was tried on the targets which missed a gate, and what it gained there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from jetway.configs.schema import Fallback, Precision
from jetway.tasks.gates import gates_exit_code
from jetway.tasks.results import VariantResult, Verdict

TITLES = ("fallback", "changes", "target", "status", "predicted", "measured", "what it missed")
#: Bytes of a weight; what a precision keeps in float beside them is not predicted.
BYTES_A_WEIGHT = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2}


class RungStatus(StrEnum):
    #: Every target that it was tried on passed its gates.
    PASSED = "PASSED"
    MISSED = "MISSED"
    FAILED = "FAILED"
    NOT_TRIED = "NOT TRIED"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gain(_Value):
    """What a fallback is against the first try on one target, as ratios: the variant that missed a gate there, and
    the one in its place. What is predicted follows from MACs and weights alone; None was not or cannot be told."""

    target: str
    variant: str
    instead_of: str
    passed: bool
    predicted_latency_ratio: float | None = Field(
        default=None,
        description="Ratio of the MACs; none where the precision differs, of which they say nothing.",
    )
    predicted_size_ratio: float | None = Field(
        default=None, description="Ratio of weights times their bytes."
    )
    measured_latency_ratio: float | None = Field(
        default=None, description="Ratio of the medians, each in canaries of its own session."
    )
    measured_size_ratio: float | None = None
    missed: tuple[str, ...] = Field(
        default=(), description="Gates that did not pass, with what was measured."
    )

    def metrics(self) -> dict[str, float | None]:
        """As the fallback's run in MLflow has them, by target."""
        ratios = self.model_dump(include={name for name in Gain.model_fields if name.endswith("_ratio")})
        return {f"{self.target}.{name}": value for name, value in ratios.items()}


class Rung(_Value):
    """One fallback: its run, if it was tried, and how that ended."""

    name: str
    overrides: dict[str, str]
    status: RungStatus
    run_id: str = ""
    minutes: float = 0.0
    gains: tuple[Gain, ...] = ()
    error: str = Field(default="", description="Why it failed, or was not tried.")

    @property
    def passed(self) -> tuple[str, ...]:
        """Targets whose gates it passed."""
        return tuple(gain.target for gain in self.gains if gain.passed)


def overrides_of(fallback: Fallback) -> dict[str, str]:
    return {key: str(value) for key, value in fallback.overrides.items()}


def gain_of(
    target: str,
    first: Sequence[VariantResult],
    then: Sequence[VariantResult],
    canaries_ms: tuple[float | None, float | None],
) -> Gain:
    """What a fallback's rows on a target are against the first ones; ``canaries_ms`` are those of both sessions."""
    before = missed_row(first)
    after = next((row for row in then if row.variant == before.variant), None) or missed_row(then)
    return Gain(
        target=target,
        variant=after.variant,
        instead_of=before.variant,
        passed=gates_exit_code(then) == 0,
        predicted_latency_ratio=predicted_latency_ratio(before, after),
        predicted_size_ratio=predicted_size_ratio(before, after),
        measured_latency_ratio=measured_latency_ratio(before, after, canaries_ms),
        measured_size_ratio=_ratio(after.value("size_bytes"), before.value("size_bytes")),
        missed=tuple(missed_gates(then)),
    )


def missed_row(rows: Sequence[VariantResult]) -> VariantResult:
    """The row with the first gate that failed; the last row where none has."""
    failing = (row for row in rows if any(gate.verdict is Verdict.FAIL for gate in row.gates))
    return next(failing, rows[-1])


def missed_gates(rows: Sequence[VariantResult]) -> list[str]:
    """Each gate of the rows that did not pass, and what was measured."""
    return [
        f"{row.variant}: {gate.verdict} {gate.metric} {_number(gate.value)}, limit {_number(gate.limit)}"
        for row in rows
        for gate in row.gates
        if not gate.passed
    ]


def predicted_latency_ratio(before: VariantResult, after: VariantResult) -> float | None:
    same = (before.precision, before.engine) == (after.precision, after.engine)
    return _ratio(after.value("macs"), before.value("macs")) if same else None


def predicted_size_ratio(before: VariantResult, after: VariantResult) -> float | None:
    weights = _ratio(after.value("params"), before.value("params"))
    return weights and weights * _bytes_a_weight(after) / _bytes_a_weight(before)


def measured_latency_ratio(
    before: VariantResult, after: VariantResult, canaries_ms: tuple[float | None, float | None]
) -> float | None:
    """In canaries, because sessions minutes apart find another machine; None unless both are valid."""
    if not before.validity.joined(after.validity).valid:
        return None
    canary = _ratio(canaries_ms[1], canaries_ms[0])
    return _ratio(_ratio(after.value("latency_ms_p50"), before.value("latency_ms_p50")), canary)


def ladder_markdown(ladder: Sequence[Rung]) -> str:
    """For a run's description; empty without a ladder."""
    if not ladder:
        return ""
    lines = ["**Plan B**, in the order of the recipe; ratios are to the first try", "", _line(TITLES)]
    lines.append(_line([":--"] * len(TITLES)))
    return "\n".join([*lines, *(_line(cells) for _, cells in ladder_lines(ladder))])


def ladder_lines(ladder: Sequence[Rung]) -> list[tuple[RungStatus, tuple[str, ...]]]:
    """Status and cells below ``TITLES`` of each fallback and target; one line of a fallback that has no figures."""
    return [line for rung in ladder for line in _rung_lines(rung)]


def _rung_lines(rung: Rung) -> list[tuple[RungStatus, tuple[str, ...]]]:
    changes = ", ".join(f"{key}={value}" for key, value in rung.overrides.items())
    if not rung.gains:
        return [(rung.status, (rung.name, changes, "", rung.status, "", "", rung.error))]
    return [(status_of(gain), (rung.name, changes, *_gain_cells(gain))) for gain in rung.gains]


def status_of(gain: Gain) -> RungStatus:
    return RungStatus.PASSED if gain.passed else RungStatus.MISSED


def _gain_cells(gain: Gain) -> tuple[str, ...]:
    return (
        gain.target,
        status_of(gain),
        _ratios(gain.predicted_latency_ratio, gain.predicted_size_ratio),
        _ratios(gain.measured_latency_ratio, gain.measured_size_ratio),
        "; ".join(gain.missed),
    )


def ladder_table(ladder: Sequence[Rung]) -> Table:
    """For a terminal."""
    table = Table(box=None, pad_edge=False, title="Plan B", title_justify="left", title_style="bold")
    for title in TITLES:
        table.add_column(title, overflow="fold")
    for status, cells in ladder_lines(ladder):
        table.add_row(*cells, style="green" if status is RungStatus.PASSED else "")
    return table


def _ratios(latency: float | None, size: float | None) -> str:
    told: Mapping[str, float | None] = {"latency": latency, "size": size}
    return ", ".join(f"{name} {f'x{value:.3f}' if value else 'unknown'}" for name, value in told.items())


def _bytes_a_weight(row: VariantResult) -> int:
    return BYTES_A_WEIGHT.get(Precision(row.precision), 1)


def _ratio(value: float | None, before: float | None) -> float | None:
    return None if value is None or not before else value / before


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
