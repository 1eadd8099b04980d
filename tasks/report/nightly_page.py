"""The page of a night: what got worse against the champions, and how each figure went over the nights before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from jetway.tasks.comparison import EXACT_METRICS
from jetway.tasks.gates import EXIT_NO_VERDICT, EXIT_PASSED
from jetway.tasks.history import Series
from jetway.tasks.nightly import EXIT_ORDER, NightResult, NightRow
from jetway.tasks.report.changes import change_tiles, changes_table, effect_figures, judged_metrics
from jetway.tasks.report.headline import MISSED, PASSED, UNDECIDED, Headline
from jetway.tasks.report.page import render
from jetway.tasks.report.sections import Figure
from jetway.tasks.report.series import draw_series, moves_text, series_key
from jetway.tasks.report.words import count_of, listed

SIDES = ("champion", "candidate")


@dataclass(frozen=True)
class NightMaterial:
    """A night, and by the name of each of its rows the series that end with it."""

    started: datetime
    result: NightResult
    history: Mapping[str, Sequence[Series]] = field(default_factory=dict)


@dataclass(frozen=True)
class NightSection:
    """All that is told of one recipe on one target."""

    row: NightRow
    tone: str
    figures: tuple[Figure, ...]

    @property
    def simulated(self) -> bool:
        return is_simulated(self.row)


def night_html(night: NightMaterial) -> str:
    """The whole page. Names and texts are escaped wherever they stand."""
    rows = sorted(night.result.rows, key=lambda row: EXIT_ORDER.index(row.exit_code))
    judged = judged_metrics(night.result.compared())
    return render(
        "nightly.html.jinja",
        title=f"Night of {night.started:%Y-%m-%d}",
        simulated=any(is_simulated(row) for row in rows),
        night=night,
        headline=Headline(night_sentence(rows), tone_of(night.result.exit_code), change_tiles(judged)),
        changes=changes_table(judged, SIDES) if judged else None,
        figures=effect_figures(judged, SIDES),
        sections=[_section(row, night.history.get(row.name, ())) for row in rows],
    )


def night_sentence(rows: Sequence[NightRow]) -> str:
    """What got worse or failed; else what is not known; else that all is well."""
    tones = {tone: [row for row in rows if tone_of(row.exit_code) == tone] for tone in (MISSED, UNDECIDED)}
    named = {tone: listed([f"{row.name} {row.status}" for row in found]) for tone, found in tones.items()}
    if named[MISSED]:
        return named[MISSED]
    if named[UNDECIDED]:
        return f"Nothing is known to be worse; not decided: {named[UNDECIDED]}"
    return f"Nothing is worse than the champions, in {count_of(len(rows), 'comparison')}"


def tone_of(exit_code: int) -> str:
    return {EXIT_PASSED: PASSED, EXIT_NO_VERDICT: UNDECIDED}.get(exit_code, MISSED)


def is_simulated(row: NightRow) -> bool:
    return row.candidate is not None and row.candidate.simulated


def _section(row: NightRow, history: Sequence[Series]) -> NightSection:
    figures = [_figure(series, simulated=is_simulated(row)) for series in history if _is_telling(series)]
    return NightSection(row, tone_of(row.exit_code), tuple(figures))


def _is_telling(series: Series) -> bool:
    """A size that never changed needs no chart."""
    return series.metric not in EXACT_METRICS or len({point.value for point in series.points}) > 1


def _figure(series: Series, *, simulated: bool) -> Figure:
    title = f"{series.metric}, night by night{' (SIMULATED)' if simulated else ''}"
    what = (
        "The median of each night's own session"
        if series.metric.startswith("latency")
        else "Each night's figure"
    )
    caption = (
        f"{what} of {listed(series.variants)} on {listed(series.boards)}, with its 95 % interval where it has one. "
        f"{moves_text(series)} Levels drift with the machine: verdicts come from measuring in turns, not from here."
    )
    return Figure(title, draw_series(series, title, simulated=simulated), caption, series_key(series))
