"""The tables of a report, as cells that the page sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jetway.tasks.gates import winner
from jetway.tasks.ladder import TITLES, Rung, RungStatus, ladder_lines
from jetway.tasks.metrics import Metric
from jetway.tasks.report.material import CalibrationMaterial, Lineage, RunMaterial
from jetway.tasks.report.words import count_of, interval_text, listed
from jetway.tasks.results import GateVerdict, VariantResult, Verdict
from jetway.tasks.table import Column, columns_of

#: Columns that a narrow screen shows before it must be scrolled, behind the variant.
FIRST_COLUMNS = ("variant", "p50 ms", "size")
#: How a verdict looks, the worst first; the mark is for those who do not tell colours.
VERDICTS = {Verdict.FAIL: ("bad", "✗"), Verdict.UNKNOWN: ("unsure", "?"), Verdict.PASS: ("good", "✓")}
RUNG_TONES = {
    RungStatus.PASSED: "good",
    RungStatus.MISSED: "bad",
    RungStatus.FAILED: "bad",
    RungStatus.NOT_TRIED: "",
}
DIGEST_CHARACTERS = 16
#: What always stands in one line.
LINE_CHARACTERS = 24
#: Scenes of a calibration set that are shown, the most frequent first; the rest is summed up.
SHOWN_SCENES = 12
NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """A figure or words, what the figure is against the baseline, and its classes in the style sheet."""

    value: str
    class_: str = "words"
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table that scrolls within itself; the first column stays in sight."""

    caption: str
    titles: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]


def wrapping(words: str) -> Cell:
    """A cell that takes several lines where its words are many."""
    return Cell(words, "words long" if len(words) > LINE_CHARACTERS else "words")


def stage_table(rows: Sequence[VariantResult], metrics: Sequence[Metric]) -> Table:
    """The stage table of one target, with every column that it has, the most telling ones first."""
    columns = _in_order(columns_of(metrics, rows), (*FIRST_COLUMNS, metrics[0].name, "gates", "valid"))
    best = winner(rows)
    return Table(
        caption=f"What each variant is and does on {rows[0].target}",
        titles=tuple(Cell(column.title, _side(column)) for column in columns),
        rows=tuple(tuple(_stage_cell(column, row, best) for column in columns) for row in rows),
    )


def _in_order(columns: Sequence[Column], first: Sequence[str]) -> list[Column]:
    return sorted(
        columns, key=lambda column: first.index(column.title) if column.title in first else len(first)
    )


def _stage_cell(column: Column, row: VariantResult, best: VariantResult | None) -> Cell:
    against = tuple(column.against(row))
    if column.title == "variant" and row is best and row.validity.valid and not row.simulated:
        against = ("fastest, no gate failed",)
    return Cell(column.value(row), f"{_side(column)} {_tone(column, row)}".strip(), against)


def _side(column: Column) -> str:
    return "words" if column.justify == "left" else "figure"


def _tone(column: Column, row: VariantResult) -> str:
    if column.title == "valid":
        return "" if row.validity.valid else "unsure"
    if column.title == "gates" and row.gates:
        return next(
            tone for verdict, (tone, _) in VERDICTS.items() if verdict in {g.verdict for g in row.gates}
        )
    return ""


def gates_table(rows: Sequence[VariantResult]) -> Table | None:
    """The checklist: every gate on every row that it applies to, what missed it first; None without gates."""
    judged = [(row, gate) for row in rows for gate in row.gates]
    judged.sort(key=lambda one: list(VERDICTS).index(one[1].verdict))
    if not judged:
        return None
    titles = [Cell(title) for title in ("verdict", "gate", "variant", "target")]
    titles += [Cell(title, "figure") for title in ("limit", "measured", "95 % interval")]
    return Table(
        caption="Every gate on every variant that it applies to",
        titles=tuple(titles),
        rows=tuple(_gate_cells(row, gate) for row, gate in judged),
    )


def _gate_cells(row: VariantResult, gate: GateVerdict) -> tuple[Cell, ...]:
    tone, mark = VERDICTS[gate.verdict]
    return (
        Cell(f"{mark} {gate.verdict}", f"words {tone}"),
        wrapping(gate.name),
        Cell(row.variant),
        Cell(f"{row.target} (simulated)" if row.simulated else row.target),
        Cell(f"{gate.limit:g}", "figure"),
        Cell("nothing" if gate.value is None else f"{gate.value:.4g}", "figure"),
        Cell(interval_text(gate.interval) or NOTHING, "figure"),
    )


def ladder_table(ladder: Sequence[Rung]) -> Table | None:
    """What each fallback gave on each target; None without a ladder."""
    if not ladder:
        return None
    return Table(
        caption="The fallbacks in the recipe's order",
        titles=tuple(Cell(title) for title in TITLES),
        rows=tuple(
            tuple(Cell(text, f"words {RUNG_TONES[status]}") for text in cells)
            for status, cells in ladder_lines(ladder)
        ),
    )


def validity_table(run: RunMaterial) -> Table:
    """How each session went: whether it is valid, and what that rests on."""
    titles = ("rounds", "left out as disturbed", "queries", "canary's drift", "largest drift against it")
    return Table(
        caption="Whether the sessions support what is said of them",
        titles=(Cell("target"), Cell("valid"), *(Cell(title, "figure") for title in titles)),
        rows=tuple(_session_cells(run, target, len(titles)) for target in run.target_names()),
    )


def _session_cells(run: RunMaterial, target: str, figures: int) -> tuple[Cell, ...]:
    valid = all(row.validity.valid for row in run.rows_of(target))
    session = run.target(target).benchmark
    told = [NOTHING] * figures
    if session:
        told = [
            f"{session.rounds}",
            f"{len(session.excluded_rounds)}",
            f"{sum(one.latency.count for one in session.variants.values()):,}",
            f"{session.canary_drift_ratio:.1%}",
            f"{max((one.drift_ratio for one in session.variants.values()), default=0.0):.1%}",
        ]
    verdict = Cell("✓ yes", "words good") if valid else Cell("✗ NO", "words unsure")
    return (Cell(target), verdict, *(Cell(text, "figure") for text in told))


def calibration_table(found: CalibrationMaterial) -> Table:
    """How many samples of a calibration set show each scene, and which scenes are in the evaluation data alone."""
    ordered = sorted(found.scenes.items(), key=lambda one: (-one[1], one[0]))
    shown, others = ordered[:SHOWN_SCENES], ordered[SHOWN_SCENES:]
    lines = [(scene, count, "") for scene, count in shown]
    if others:
        lines.append((count_of(len(others), "rarer scene"), sum(count for _, count in others), ""))
    if found.only_in_evaluation:
        missing = list(found.only_in_evaluation)
        lines.append((f"in the evaluation data alone: {listed(missing)}", 0, "unsure"))
    digest = found.sha256[:DIGEST_CHARACTERS]
    return Table(
        caption=f"Set {found.name}: {count_of(found.samples, 'sample')}, sha256 {digest}",
        titles=(Cell("scene"), Cell("samples", "figure")),
        rows=tuple(
            (Cell(scene, f"words {tone}".strip()), Cell(f"{count:,}", f"figure {tone}".strip()))
            for scene, count, tone in lines
        ),
    )


def lineage_table(lineage: Sequence[Lineage]) -> Table | None:
    """The digests behind each row, from the weights to the answers that were scored; None where none are known."""
    if not lineage:
        return None
    kinds = list(dict.fromkeys(kind for one in lineage for kind, _ in one.files))
    titles = ("variant", "target", "built by", *(f"{kind}, sha256" for kind in kinds))
    return Table(
        caption=f"The files behind each row, by the first {DIGEST_CHARACTERS} digits; equal digests are equal files",
        titles=tuple(Cell(title) for title in titles),
        rows=tuple(_lineage_cells(one, kinds) for one in lineage),
    )


def _lineage_cells(one: Lineage, kinds: Sequence[str]) -> tuple[Cell, ...]:
    digests = [dict(one.files).get(kind, NOTHING)[:DIGEST_CHARACTERS] for kind in kinds]
    texts = (one.variant, one.target, one.engine_version or NOTHING)
    return (*map(Cell, texts), *(Cell(digest, "words digest") for digest in digests))
