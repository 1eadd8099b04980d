"""The report of a comparison as one page: what changed from one run to another, what can be said of it, and what both
rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jetway.tasks.comparison import ComparedRow, differing_params, overall_change
from jetway.tasks.duel import METRIC
from jetway.tasks.report.beside import DIFFERS, RUNS, beside
from jetway.tasks.report.changes import (
    CHANGES,
    Judged,
    change_tiles,
    changes_table,
    effect_figures,
    judged_metrics,
)
from jetway.tasks.report.headline import PASSED, Headline
from jetway.tasks.report.material import RunMaterial
from jetway.tasks.report.origin import made_by, packages_of
from jetway.tasks.report.page import render
from jetway.tasks.report.sections import Figure, Key, Side, TargetSection, target_section
from jetway.tasks.report.tables import (
    DIGEST_CHARACTERS,
    NOTHING,
    Cell,
    Table,
    gates_table,
    lineage_table,
    validity_table,
    wrapping,
)
from jetway.tasks.report.words import count_of, listed, metric_words
from jetway.tasks.verdict import Change

#: Parts of a headline that are named.
PARTS_SHOWN = 3
Pair = tuple[RunMaterial, RunMaterial]
Differences = Mapping[str, tuple[str | None, str | None]]


@dataclass(frozen=True)
class ComparisonMaterial:
    """Two runs, and what changed from the first to the second."""

    runs: Pair
    rows: Sequence[ComparedRow]
    params: Differences
    unmatched: Sequence[str] = ()

    def target_names(self) -> list[str]:
        return list(dict.fromkeys(row.target for row in self.rows))

    @property
    def judged(self) -> list[Judged]:
        return judged_metrics(self.rows)


@dataclass(frozen=True)
class ComparedTarget:
    """What both runs measured on one target: a section of each, and their stage tables and charts side by side."""

    name: str
    sections: tuple[tuple[str, TargetSection], ...]
    table: Table | None
    key: Key
    figures: tuple[Figure, ...]

    @property
    def simulated(self) -> bool:
        return any(section.simulated for _, section in self.sections)


def comparison_html(comparison: ComparisonMaterial) -> str:
    """The whole page. Names and texts of the runs are escaped wherever they stand."""
    first, second = runs = comparison.runs
    made = [{**made_by(run), **packages_of(run)} for run in runs]
    return render(
        "comparison.html.jinja",
        title=f"{second.title} against {first.title}",
        simulated=first.simulated or second.simulated,
        comparison=comparison,
        headline=comparison_headline(comparison),
        changes=changes_table(comparison.judged),
        figures=effect_figures(comparison.judged, order=variants_of(runs)),
        untimed=is_untimed(comparison.judged),
        params=differences_table(comparison.params, "Params that differ; all others are the same"),
        targets=[compared_target(runs, name) for name in comparison.target_names()],
        gates=gates_of(runs),
        validity=validity_of(runs),
        origin=differences_table(differing_params(*made), "What differs of where the runs come from"),
        origin_of_both={name: text for name, text in made[0].items() if made[1].get(name) == text},
        lineage=lineage_of(runs),
    )


def compared_target(runs: Pair, target: str) -> ComparedTarget:
    """The sections of both runs' own reports, on the same axes. Variants have the same marks on both sides."""
    sections = [
        target_section(run, target, "", Side(name, variants_of(runs), other))
        for run, name, other in zip(runs, RUNS, reversed(runs), strict=True)
    ]
    figures = [figure for section in sections for figure in section.figures]
    titles = [figure.title for figure in figures]
    return ComparedTarget(
        name=target,
        sections=tuple(zip(RUNS, sections, strict=True)),
        table=beside(
            (sections[0].table, sections[1].table), ("variant",), f"What each variant is and does on {target}"
        ),
        key=tuple(dict.fromkeys(entry for section in sections for entry in section.key)),
        figures=tuple(sorted(figures, key=lambda figure: titles.index(figure.title))),
    )


def variants_of(runs: Pair) -> list[str]:
    """Of both, in the order of the first run's recipe."""
    return list(dict.fromkeys(name for run in runs for name in run.variants()))


def is_untimed(judged: Sequence[Judged]) -> bool:
    """Whether a latency was not decided because nothing was measured in turns."""
    return any(
        one.metric == METRIC and one.change is Change.UNKNOWN and one.evidence is None for _, one in judged
    )


def validity_of(runs: Pair) -> Table | None:
    """How the sessions of both went."""
    tables = validity_table(runs[0]), validity_table(runs[1])
    return beside(tables, ("target",), "Whether the sessions support what is said of them")


def gates_of(runs: Pair) -> Table | None:
    """The checklists of both runs; None where no recipe sets gates."""
    tables = gates_table(runs[0].rows), gates_table(runs[1].rows)
    return beside(tables, ("gate", "variant", "target"), "Every gate on every variant that it applies to")


def lineage_of(runs: Pair) -> Table | None:
    """The files behind each row of both; None where none are known."""
    tables = lineage_table(runs[0].lineage), lineage_table(runs[1].lineage)
    caption = f"The files behind each row, by the first {DIGEST_CHARACTERS} digits; {DIFFERS} stands where they differ"
    return beside(tables, ("variant", "target"), caption, marked=True)


def comparison_headline(comparison: ComparisonMaterial) -> Headline:
    """What got worse; else what cannot be told; else what got better."""
    judged = comparison.judged
    worst = overall_change(comparison.rows)
    named = named_together([one for one in judged if one[1].change is worst])
    sentence = {
        Change.REGRESSED: f"Worse: {named}",
        Change.UNKNOWN: f"Nothing is known to be worse; no verdict on {named}",
        Change.IMPROVED: f"Nothing is worse; better: {named}",
        Change.SAME: "Nothing changed beyond the margins",
    }[worst]
    return Headline(sentence, CHANGES[worst][0] or PASSED, change_tiles(judged))


def named_together(judged: Sequence[Judged]) -> str:
    """``MACs and size of 3 variants on bench``: variants of a target of which the same is told, in one part."""
    metrics: dict[tuple[str, str], list[str]] = {}
    for row, metric in judged:
        metrics.setdefault((row.target, row.variant), []).append(metric_words(metric.metric))
    variants: dict[tuple[str, str], list[str]] = {}
    for (target, variant), names in metrics.items():
        variants.setdefault((listed(names), target), []).append(variant)
    parts = [f"{names} of {_named(found)} on {target}" for (names, target), found in variants.items()]
    more = len(parts) - PARTS_SHOWN
    return "; ".join([*parts[:PARTS_SHOWN], *([f"{more} more"] if more > 0 else [])])


def _named(variants: list[str]) -> str:
    return listed(variants) if len(variants) < 3 else count_of(len(variants), "variant")


def differences_table(values: Differences, caption: str) -> Table | None:
    """What differs, and nothing else; None where nothing does."""
    if not values:
        return None
    return Table(
        caption=caption,
        titles=(Cell("what"), *map(Cell, RUNS)),
        rows=tuple(
            (Cell(name), *(wrapping(NOTHING if value is None else value) for value in sides))
            for name, sides in values.items()
        ),
    )
