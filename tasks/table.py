"""The stage table: one row a variant, on the terminal, in Markdown, and as the object of ``--json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jetway.tasks.artifacts import SCHEMA_VERSION
from jetway.tasks.metrics import Metric
from jetway.tasks.results import (
    BASELINE,
    GateVerdict,
    TargetOutcome,
    TargetStatus,
    VariantResult,
    Verdict,
    drop_name,
)

NOTHING = "-"
_VERDICT_STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.UNKNOWN: "yellow"}


class Column(NamedTuple):
    """A column: the value, and under it on the terminal what it is against the baseline."""

    title: str
    value: Callable[[VariantResult], str]
    against: Callable[[VariantResult], Sequence[str]] = lambda row: ()
    #: Terminal width from which on the column is shown.
    min_width: int = 0
    justify: Any = "right"
    #: Metric without which, in every row, the column is left out.
    needs: str | None = None


def stage_table(
    rows: Sequence[VariantResult], metrics: Sequence[Metric], *, width: int = 120
) -> RenderableType:
    """One table a target for a terminal ``width`` columns wide; on a narrow one the less telling columns go.

    Under a value stands what it is against baseline-fp32 on the same target, and that figure's 95 % interval.
    """
    columns = [column for column in columns_of(metrics, rows) if column.min_width <= width]
    return Group(*(_target_table(columns, group) for group in _by_target(rows)))


def table_notes(rows: Sequence[VariantResult]) -> list[str]:
    """Lines to print under the table: invalid measurements, notes, and each gate that did not pass.

    What holds for several variants of a target, as a session that was disturbed does, is said once.
    """
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for text in _notes_of(row):
            said.setdefault((row.target, text), []).append(row.variant)
    return [f"{', '.join(variants)} on {target}: {text}" for (target, text), variants in said.items()]


def _notes_of(row: VariantResult) -> list[str]:
    invalid = [] if row.validity.valid else [f"INVALID measurement: {'; '.join(row.validity.reasons)}"]
    missed = [gate for gate in row.gates if not gate.passed]
    gates = [f"gate {gate.verdict}: {gate.name}, measured {_evidence(gate)}" for gate in missed]
    return [*invalid, *row.notes, *gates]


def stage_table_markdown(rows: Sequence[VariantResult], metrics: Sequence[Metric]) -> str:
    """The same table in Markdown, for a run's description and a README; one table a target."""
    columns = columns_of(metrics, rows)
    parts = []
    for group in _by_target(rows):
        titles = [column.title for column in columns]
        lines = [f"**{_where(group)}**", "", _line(titles)]
        lines.append(_line([":--" if column.justify == "left" else "--:" for column in columns]))
        lines += [_line([_flat(column, row) for column in columns]) for row in group]
        parts.append("\n".join(lines))
    notes = "\n".join(f"- {note}" for note in table_notes(rows))
    return "\n\n".join([*parts, notes]).strip() + "\n"


def run_json(
    run_id: str,
    status: str,
    exit_code: int,
    stages: Sequence[tuple[str, float, bool]],
    overhead_s: float,
    rows: Sequence[VariantResult],
    targets: Sequence[TargetOutcome] = (),
) -> dict[str, Any]:
    """The one object that ``--json`` prints. ``stages`` are (name, seconds, cached)."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "status": status,
        "exit_code": exit_code,
        "stages": [{"name": n, "seconds": round(s, 3), "cached": cached} for n, s, cached in stages],
        "overhead_s": round(overhead_s, 3),
        "variants": [_row_json(row) for row in rows],
        "targets": [outcome.model_dump(mode="json") for outcome in targets],
    }


def outcome_line(outcome: TargetOutcome) -> str:
    """A line for a target without a result, to stand below the table."""
    if outcome.status is TargetStatus.QUARANTINED:
        return f"LEFT OUT, in quarantine: {outcome.told}"
    return f"NO RESULT (exit code {outcome.exit_code}): {outcome.told}"


def human_count(value: float | None) -> str:
    """1234567 → ``1.23 M``."""
    return _scaled(value, ("", " k", " M", " G", " T"))


def human_bytes(value: float | None) -> str:
    """1234567 → ``1.23 MB``, in powers of ten."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def columns_of(metrics: Sequence[Metric], rows: Sequence[VariantResult]) -> list[Column]:
    """The columns that every table has, and those of what some row has measured."""
    first, *others = metrics
    measured = {name for row in rows for name in row.measured()}
    columns = [
        Column("variant", lambda row: row.variant, justify="left"),
        Column("params", _of("params", human_count), _ratio("params_ratio"), 110),
        Column("MACs", _of("macs", human_count), _ratio("macs_ratio"), 80),
        Column("size", _of("size_bytes", human_bytes), _ratio("size_ratio")),
        Column("p50 ms", _of("latency_ms_p50"), _ratio("latency_p50_ratio")),
        Column("p90 ms", _of("latency_ms_p90"), min_width=116),
        Column("p99 ms", _of("latency_ms_p99"), min_width=90),
        Column("samples/s", _of("throughput_samples_per_s"), min_width=110),
        _if_measured("in flight/s", "in_flight_samples_per_s"),
        _if_measured("FPS", "stream_fps_pipelined"),
        _if_measured("cascade ms", "cascade_ms_p50"),
        _if_measured("cascade mAP", "cascade_map50_95"),
        _if_measured("W", "power_w_mean"),
        _if_measured("mJ", "energy_mj_per_inference"),
        Column("MiB", _of("peak_memory_mib"), min_width=110),
        Column(first.name, _of(first.name, _fraction), _drop(first)),
        *[Column(m.name, _of(m.name, _fraction), _drop(m), 130) for m in others],
        Column("valid", _validity, justify="left"),
        Column("gates", _gates, justify="left"),
    ]
    return [column for column in columns if column.needs is None or column.needs in measured]


def _if_measured(title: str, metric: str) -> Column:
    return Column(title, _of(metric), min_width=100, needs=metric)


def _validity(row: VariantResult) -> str:
    valid = "yes" if row.validity.valid else "NO"
    return f"{valid}, simulated" if row.simulated else valid


def _target_table(columns: Sequence[Column], group: Sequence[VariantResult]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.title, table.title_justify, table.title_style = _where(group), "left", "bold"
    for column in columns:
        table.add_column(column.title, justify=column.justify, no_wrap=True)
    for row in group:
        table.add_row(*(_cell(column, row) for column in columns))
    return table


def _cell(column: Column, row: VariantResult) -> Text:
    value, against = column.value(row), column.against(row)
    text = Text(value, style=_style(column, row))
    for line in against:
        text.append(f"\n{line}", style="dim")
    return text


def _style(column: Column, row: VariantResult) -> str:
    if column.title == "valid":
        return "" if row.validity.valid else "bold red"
    if column.title == "gates" and row.gates:
        return _VERDICT_STYLES[_worst(row.gates)]
    return ""


def _flat(column: Column, row: VariantResult) -> str:
    value, against = column.value(row), column.against(row)
    return f"{value} ({' '.join(against)})" if against else value


def _gates(row: VariantResult) -> str:
    """The worst verdict, and how many of the gates have it."""
    if not row.gates:
        return NOTHING
    worst = _worst(row.gates)
    return f"{worst} {sum(gate.verdict is worst for gate in row.gates)}/{len(row.gates)}"


def _worst(gates: Sequence[GateVerdict]) -> Verdict:
    verdicts = {gate.verdict for gate in gates}
    return next(verdict for verdict in (Verdict.FAIL, Verdict.UNKNOWN, Verdict.PASS) if verdict in verdicts)


def _of(metric: str, text: Callable[[float | None], str] | None = None) -> Callable[[VariantResult], str]:
    return lambda row: (text or _number)(row.value(metric))


def _ratio(metric: str) -> Callable[[VariantResult], Sequence[str]]:
    return lambda row: _against(row, metric, "x")


def _drop(metric: Metric) -> Callable[[VariantResult], Sequence[str]]:
    return lambda row: _against(row, drop_name(metric), "drop ")


def _against(row: VariantResult, metric: str, prefix: str) -> Sequence[str]:
    value = row.value(metric)
    if value is None or row.variant == BASELINE:
        return ()
    interval = row.intervals.get(metric)
    lines = [f"{prefix}{value:.3f}"]
    return [*lines, f"[{interval[0]:.3f}, {interval[1]:.3f}]"] if interval else lines


def _evidence(gate: GateVerdict) -> str:
    interval = f" [{gate.interval[0]:.4g}, {gate.interval[1]:.4g}]" if gate.interval else ""
    return "nothing" if gate.value is None else f"{gate.value:.4g}{interval}"


def _fraction(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _number(value: float | None) -> str:
    """Three significant digits, and never an exponent."""
    if value is None:
        return NOTHING
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.{1 if size >= 10 else 2 if size >= 1 else 3}f}"


def _scaled(value: float | None, units: Sequence[str]) -> str:
    if value is None:
        return NOTHING
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g}{units[power]}"


def _by_target(rows: Sequence[VariantResult]) -> list[list[VariantResult]]:
    return [[row for row in rows if row.target == target] for target in dict.fromkeys(r.target for r in rows)]


def _where(group: Sequence[VariantResult]) -> str:
    engines = ", ".join(dict.fromkeys(row.engine for row in group))
    return f"{group[0].target}: {engines} on {group[0].board}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _row_json(row: VariantResult) -> dict[str, Any]:
    document = row.model_dump(mode="json", exclude={"gates"})
    gates = [gate.model_dump(mode="json") | {"passed": gate.passed} for gate in row.gates]
    return document | {"gates": gates}
