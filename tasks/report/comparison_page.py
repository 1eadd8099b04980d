"""The report of a comparison as one page: what changed from one run to another, and what can be said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from jetway.tasks.comparison import ComparedMetric, ComparedRow, overall_change
from jetway.tasks.comparison_table import comparison_texts
from jetway.tasks.report.effects import Effect, draw_effects
from jetway.tasks.report.headline import MISSED, PASSED, UNDECIDED, Headline, Tile
from jetway.tasks.report.page import render
from jetway.tasks.report.sections import Figure
from jetway.tasks.report.tables import NOTHING, Cell, Table
from jetway.tasks.report.words import count_of, listed
from jetway.tasks.verdict import Change

#: How a change looks, the worst first; the mark is for those who do not tell colours.
CHANGES = {
    Change.REGRESSED: (MISSED, "✗", "worse beyond the margin"),
    Change.UNKNOWN: (UNDECIDED, "?", "the evidence does not decide"),
    Change.IMPROVED: (PASSED, "✓", "better"),
    Change.SAME: ("", "=", "within the margin"),
}
Judged = tuple[ComparedRow, ComparedMetric]
Sides = tuple[str, str]
#: What is compared, where nothing else is said.
RUNS: Sides = ("first run", "second run")


@dataclass(frozen=True)
class ComparisonMaterial:
    """Two runs by what names them, and what changed from the first to the second."""

    first: str
    second: str
    rows: Sequence[ComparedRow]
    params: Mapping[str, tuple[str | None, str | None]]
    unmatched: Sequence[str] = ()

    @property
    def judged(self) -> list[Judged]:
        return judged_metrics(self.rows)


def judged_metrics(rows: Sequence[ComparedRow]) -> list[Judged]:
    """Every metric of every row, the worst change first."""
    found = [(row, metric) for row in rows for metric in row.metrics]
    return sorted(found, key=lambda one: list(CHANGES).index(one[1].change))


def comparison_html(comparison: ComparisonMaterial) -> str:
    """The whole page. Names and texts of the runs are escaped wherever they stand."""
    return render(
        "comparison.html.jinja",
        title=f"{comparison.second} against {comparison.first}",
        simulated=any(row.simulated for row in comparison.rows),
        comparison=comparison,
        headline=comparison_headline(comparison),
        changes=changes_table(comparison.judged),
        figures=effect_figures(comparison.judged),
        params=params_table(comparison.params),
    )


def comparison_headline(comparison: ComparisonMaterial) -> Headline:
    """What got worse; else what cannot be told; else what got better."""
    judged = comparison.judged
    worst = overall_change(comparison.rows)
    named = [
        f"{metric.metric} of {row.variant} on {row.target}"
        for row, metric in judged
        if metric.change is worst
    ]
    sentence = {
        Change.REGRESSED: f"Worse: {listed(named)}",
        Change.UNKNOWN: f"Nothing is known to be worse; {count_of(len(named), 'figure')} of {len(judged)} "
        "cannot be judged",
        Change.IMPROVED: f"Nothing is worse; better: {listed(named)}",
        Change.SAME: "Nothing changed beyond the margins",
    }[worst]
    return Headline(sentence, CHANGES[worst][0] or PASSED, change_tiles(judged))


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
        *map(Cell, (name, row.variant, target)),
        *(Cell(figure or NOTHING, "figure") for figure in figures),
        Cell(metric.reason or NOTHING),
    )


def effect_figures(judged: Sequence[Judged], sides: Sides = RUNS) -> list[Figure]:
    """A chart for each metric whose change has evidence."""
    told = [(row, metric) for row, metric in judged if metric.evidence]
    told.sort(key=lambda one: one[1].metric)
    groups = groupby(told, key=lambda one: one[1].metric)
    return [_effect_figure(name, list(group), sides) for name, group in groups]


def _effect_figure(name: str, judged: Sequence[Judged], sides: Sides) -> Figure:
    simulated = any(row.simulated for row, _ in judged)
    evidence = [metric.evidence for _, metric in judged if metric.evidence]
    margin, in_runs = max(one.margin for one in evidence), evidence[0].unit == "runs"
    effects = [
        Effect(f"{row.variant} on {row.target}", metric.change, one.effect, one.interval, index)
        for index, ((row, metric), one) in enumerate(zip(judged, evidence, strict=True))
    ]
    title = f"How much worse {name} is{' (SIMULATED)' if simulated else ''}"
    unit = f"share of the {sides[0]}'s" if in_runs else f"drop of {name}"
    paired = "runs measured in turns" if in_runs else "samples that both sides saw"
    return Figure(
        title,
        draw_effects(effects, margin, unit, title=title, simulated=simulated),
        f"95 % intervals, paired by {paired}. The band is the margin of {margin:g}.",
    )


def params_table(params: Mapping[str, tuple[str | None, str | None]]) -> Table | None:
    """The params that differ, and no other; None where none does."""
    if not params:
        return None
    return Table(
        caption="Params that differ; all others are the same",
        titles=(Cell("param"), Cell("first"), Cell("second")),
        rows=tuple(
            (Cell(name), *(Cell(NOTHING if value is None else value) for value in values))
            for name, values in params.items()
        ),
    )
