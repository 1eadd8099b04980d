"""What changed between two sides, as tiles, a table and charts: of two runs, or of a night against the champions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from jetway.tasks.comparison import ComparedMetric, ComparedRow
from jetway.tasks.comparison_table import comparison_texts
from jetway.tasks.report.beside import RUNS, Sides
from jetway.tasks.report.effects import Effect, draw_effects
from jetway.tasks.report.headline import MISSED, PASSED, UNDECIDED, Tile
from jetway.tasks.report.sections import Figure
from jetway.tasks.report.tables import NOTHING, Cell, Table, wrapping
from jetway.tasks.report.words import metric_words
from jetway.tasks.verdict import Change, Evidence

#: How a change looks, the worst first; the mark is for those who do not tell colours.
CHANGES = {
    Change.REGRESSED: (MISSED, "✗", "worse beyond the margin"),
    Change.UNKNOWN: (UNDECIDED, "?", "the evidence does not decide"),
    Change.IMPROVED: (PASSED, "✓", "better"),
    Change.SAME: ("", "=", "within the margin"),
}
Judged = tuple[ComparedRow, ComparedMetric]


def judged_metrics(rows: Sequence[ComparedRow]) -> list[Judged]:
    """Every metric of every row, the worst change first."""
    found = [(row, metric) for row in rows for metric in row.metrics]
    return sorted(found, key=lambda one: list(CHANGES).index(one[1].change))


def change_tiles(judged: Sequence[Judged]) -> tuple[Tile, ...]:
    """How many figures changed in each way."""
    counts = Counter(metric.change for _, metric in judged)
    return tuple(
        Tile(change, f"{counts[change]}", meaning, tone if counts[change] else "")
        for change, (tone, _, meaning) in CHANGES.items()
    )


def changes_table(judged: Sequence[Judged], sides: Sides = RUNS) -> Table:
    """Every figure of both sides, the worst change first, and why one has no verdict."""
    titles = ("verdict", "metric", "variant", "target", *sides, "change", "95 % interval", "why")
    kinds = ("words",) * 4 + ("figure",) * 4 + ("words",)
    return Table(
        caption=f"What changed from the {sides[0]} to the {sides[1]}",
        titles=tuple(Cell(title, kind) for title, kind in zip(titles, kinds, strict=True)),
        rows=tuple(_change_cells(row, metric) for row, metric in judged),
    )


def _change_cells(row: ComparedRow, metric: ComparedMetric) -> tuple[Cell, ...]:
    tone, mark, _ = CHANGES[metric.change]
    target = f"{row.target} (simulated)" if row.simulated else row.target
    name, *figures = comparison_texts(metric)
    return (
        Cell(f"{mark} {metric.change}", f"words {tone}".strip()),
        *map(Cell, (metric_words(name), row.variant, target)),
        *(Cell(figure or NOTHING, "figure") for figure in figures),
        wrapping(metric.reason or NOTHING),
    )


def effect_figures(
    judged: Sequence[Judged], sides: Sides = RUNS, *, order: Sequence[str] = ()
) -> list[Figure]:
    """A chart for each metric whose change has evidence; ``order`` gives variants their marks of other charts."""
    told = [(row, metric) for row, metric in judged if metric.evidence]
    told.sort(key=lambda one: one[1].metric)
    groups = groupby(told, key=lambda one: one[1].metric)
    return [_effect_figure(metric_words(name), list(group), sides, order) for name, group in groups]


def _effect_figure(name: str, judged: Sequence[Judged], sides: Sides, order: Sequence[str]) -> Figure:
    simulated = any(row.simulated for row, _ in judged)
    evidence = [metric.evidence for _, metric in judged if metric.evidence]
    in_runs = evidence[0].unit == "runs"
    scale, sign = (100, " %") if in_runs else (1, "")
    margin = max(one.margin for one in evidence) * scale
    effects = [
        _effect(row, metric.change, one, scale, order.index(row.variant) if row.variant in order else index)
        for index, ((row, metric), one) in enumerate(zip(judged, evidence, strict=True))
    ]
    title = f"How much worse {name} is{' (SIMULATED)' if simulated else ''}"
    unit = f"% of the {sides[0]}'s" if in_runs else f"drop of {name}"
    paired = "runs measured in turns" if in_runs else "samples that both sides saw"
    return Figure(
        title,
        draw_effects(effects, margin, unit, title=title, simulated=simulated),
        f"95 % intervals, paired by {paired}. The band is the margin of {margin:g}{sign}.",
    )


def _effect(row: ComparedRow, change: Change, evidence: Evidence, scale: float, mark: int) -> Effect:
    span = evidence.interval
    interval = (span[0] * scale, span[1] * scale) if span else None
    return Effect(f"{row.variant} on {row.target}", change, evidence.effect * scale, interval, mark)
