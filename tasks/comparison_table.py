"""A comparison on the terminal and as the object of ``--json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jetway.tasks.artifacts import SCHEMA_VERSION
from jetway.tasks.comparison import ComparedMetric, ComparedRow, exit_code, overall_change
from jetway.tasks.table import NOTHING, human_bytes, human_count
from jetway.tasks.verdict import Change, Evidence

_STYLES = {Change.REGRESSED: "bold red", Change.IMPROVED: "green", Change.SAME: "", Change.UNKNOWN: "yellow"}
_TEXTS = {"params": human_count, "macs": human_count, "size_bytes": human_bytes}

Params = Mapping[str, tuple[str | None, str | None]]


def comparison_tables(
    rows: Sequence[ComparedRow], params: Params, sides: tuple[str, str] = ("first", "second")
) -> RenderableType:
    """A table for each variant on each target, and one of the params that differ, if any do."""
    tables = [_row_table(row, sides) for row in rows]
    return Group(*tables, *([_params_table(params)] if params else []))


def comparison_notes(rows: Sequence[ComparedRow]) -> list[str]:
    """Lines to print under the tables: what each verdict that needs a word rests on, or why there is none."""
    said: dict[str, list[str]] = {}
    for row in rows:
        for one in row.metrics:
            if one.reason:
                where = f"{one.metric} of {row.variant} on {row.target}"
                said.setdefault(f"{one.change}, {one.reason}", []).append(where)
    return [f"{text}: {', '.join(places)}" for text, places in said.items()]


def comparison_texts(metric: ComparedMetric) -> tuple[str, str, str, str, str]:
    """Its name, its value in the first run and in the second, the change, and the interval of that."""
    return (
        metric.metric,
        _value(metric, metric.before),
        _value(metric, metric.after),
        _change(metric),
        _interval(metric),
    )


def comparison_json(
    runs: tuple[str, str], rows: Sequence[ComparedRow], params: Params, unmatched: Sequence[str]
) -> dict[str, Any]:
    """The one object that ``--json`` prints. ``unmatched`` are lines of what one run alone has."""
    change = overall_change(rows)
    return {
        "schema_version": SCHEMA_VERSION,
        "run_ids": list(runs),
        "change": change,
        "exit_code": exit_code(change),
        "rows": [row.model_dump(mode="json") for row in rows],
        "unmatched": list(unmatched),
        "params": {name: list(values) for name, values in params.items()},
    }


def _row_table(row: ComparedRow, sides: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.title = f"{row.variant} on {row.target}{' (simulated)' if row.simulated else ''}"
    table.title_justify, table.title_style = "left", "bold"
    for title in ("metric", *sides, "change", "95 %", "verdict"):
        table.add_column(title, justify="left" if title in ("metric", "verdict") else "right")
    for metric in row.metrics:
        table.add_row(*_cells(metric))
    return table


def _cells(metric: ComparedMetric) -> list[str | Text]:
    return [*comparison_texts(metric), Text(metric.change, style=_STYLES[metric.change])]


def _value(metric: ComparedMetric, value: float | None) -> str:
    if value is None:
        return NOTHING
    usual = "{:.4g} ms" if "_ms_" in metric.metric else "{:.4g}"
    return _TEXTS.get(metric.metric, usual.format)(value)


def _change(metric: ComparedMetric) -> str:
    """Of a score the drop, as its interval is one; of any other figure its share."""
    if metric.evidence:
        return _effect(metric.evidence, metric.evidence.effect)
    if metric.before is None or metric.after is None:
        return NOTHING
    return f"{metric.after / metric.before - 1:+.1%}" if metric.before else NOTHING


def _interval(metric: ComparedMetric) -> str:
    if metric.evidence is None or metric.evidence.interval is None:
        return ""
    low, high = (_effect(metric.evidence, edge).removeprefix("drop ") for edge in metric.evidence.interval)
    return f"[{low}, {high}]"


def _effect(evidence: Evidence, value: float) -> str:
    return f"{value:+.1%}" if evidence.unit == "runs" else f"drop {value:.4f}"


def _params_table(params: Params) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.title, table.title_justify, table.title_style = "params that differ", "left", "bold"
    for title in ("param", "first", "second"):
        table.add_column(title)
    for name, values in params.items():
        table.add_row(name, *(NOTHING if value is None else Text(value) for value in values))
    return table
