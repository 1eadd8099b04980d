"""``jetway compare``: two stored runs side by side, from their records in MLflow."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from jetway.flows.record import with_comparison
from jetway.flows.report import check_output, read_run
from jetway.flows.stored_run import StoredRun
from jetway.flows.terminal import Terminal
from jetway.tasks.comparison import (
    NOT_IN_TURNS,
    ComparedRow,
    RowPair,
    compare_rows,
    differing_params,
    exit_code,
    match_rows,
    overall_change,
    select_rows,
    with_turns,
)
from jetway.tasks.comparison_table import comparison_json, comparison_notes, comparison_tables
from jetway.tasks.duel import Budget
from jetway.tasks.errors import ConfigError, TrackingError
from jetway.tasks.report.comparison_page import ComparisonMaterial, comparison_html
from jetway.tasks.results import VariantResult
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import NOTE_TAG

logger = logging.getLogger("jetway")

WHY_IN_TURNS = (
    "Times of two sessions get no verdict: sessions differ from each other even where the engine is the same. "
    "--in-turns measures both engines on their target, in turns, a fresh process each time."
)


@dataclass(frozen=True)
class Comparison:
    """Two stored runs and what changed from the first to the second."""

    runs: tuple[StoredRun, StoredRun]
    #: The first run's rows that the second has too, and what is said of each.
    matched: list[VariantResult]
    rows: list[ComparedRow]
    params: dict[str, tuple[str | None, str | None]]
    #: A line for each row that one run alone has.
    unmatched: list[str]

    @cached_property
    def page(self) -> str:
        """As HTML, with what both runs keep of themselves."""
        first, second = (read_run(run.tracker, run.record, run.result) for run in self.runs)
        return comparison_html(ComparisonMaterial((first, second), self.rows, self.params, self.unmatched))


def compare_runs(
    first: str,
    second: str,
    *,
    margin: float,
    variants: Sequence[str] = (),
    metrics: Sequence[str] = (),
    minutes: float | None = None,
    report: Path | None = None,
    as_json: bool = False,
) -> int:
    """Prints what changed from the first run to the second; with ``minutes``, engines are measured in turns first.

    The same goes to the second run in MLflow, and as an HTML page to ``report``. Returns 1 when something regressed,
    else 5 when something is UNKNOWN, else 0. Raises TrackingError for a run that is not there or has no stage table,
    ConfigError for runs that share no row and for a report that cannot be a file, TargetError for a target that
    cannot measure.
    """
    if report:
        check_output(report, "--report")
    tracker = Tracker()
    runs = StoredRun(tracker, first), StoredRun(tracker, second)
    comparison = compare_stored(*runs, margin=margin, variants=variants, metrics=metrics)
    if minutes is not None:
        comparison = measured_in_turns(comparison, minutes)
    if as_json:
        print(json.dumps(document(comparison), indent=1))
    else:
        print_comparison(comparison)
    if report:
        report.write_text(comparison.page, encoding="utf-8")
    log_comparison(comparison)
    return exit_code(overall_change(comparison.rows))


def log_comparison(comparison: Comparison) -> None:
    """Adds page and JSON to the second run's artifacts, and a link to its description. Earlier ones stay.

    What was found is printed already: that MLflow does not take it is told as a warning, and a page that cannot be
    drawn, a bug of ours, as an error.
    """
    _, second = comparison.runs
    try:
        _log_page(comparison)
    except TrackingError as exc:
        logger.warning("run %s does not keep this comparison: %s", second.run_id[:8], exc)
    except Exception:
        logger.exception("the comparison has no page in MLflow, because it cannot be drawn")


def _log_page(comparison: Comparison) -> None:
    (first, second), now = comparison.runs, datetime.now(UTC)
    tracker = second.tracker
    path = f"comparisons/{first.run_id[:8]}/{now:%Y-%m-%d-%H%M%S-%f}"
    tracker.log_text(second.run_id, f"{path}.html", comparison.page)
    tracker.log_json(second.run_id, f"{path}.json", document(comparison))
    line = (
        f"[{overall_change(comparison.rows)}]({tracker.page_of(second.run_id, f'{path}.html')}) against run "
        f"[{first.run_id[:8]}]({tracker.page_of_run(first.run_id)}), {now:%Y-%m-%d %H:%M} UTC"
    )
    note = tracker.run(second.run_id).tags.get(NOTE_TAG, "")
    tracker.describe(second.run_id, with_comparison(note, line))


def compare_stored(
    first: StoredRun,
    second: StoredRun,
    *,
    margin: float,
    variants: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> Comparison:
    """Matches the rows of two runs and judges them. Raises ConfigError when there is nothing to compare."""
    if first.run_id == second.run_id:
        raise ConfigError(
            f"Both are run {first.run_id[:8]}. Name two runs; MLflow's page lists them. Variants of one run were "
            f"measured in one session, and its own report compares them: jetway report {first.run_id[:8]}"
        )
    matched, unmatched = match_rows(
        select_rows(first.result.rows, variants), select_rows(second.result.rows, variants)
    )
    pairs = [
        RowPair(before, after, (first.scores(before), second.scores(after))) for before, after in matched
    ]
    rows = compare_rows(pairs, second.result.task_metrics, second.summarize, margin=margin, names=metrics)
    params = differing_params(first.record.params, second.record.params)
    return Comparison((first, second), [row for row, _ in matched], rows, params, unmatched)


def measured_in_turns(comparison: Comparison, minutes: float) -> Comparison:
    """The comparison with a verdict on each row's latency, of at most so many minutes each."""
    from jetway.flows.in_turns import measure_in_turns

    with Terminal() as terminal:
        results = measure_in_turns(
            *comparison.runs, comparison.matched, Budget(minutes=minutes), progress=terminal
        )
    return replace(comparison, rows=with_turns(comparison.rows, results))


def document(comparison: Comparison) -> dict[str, Any]:
    ids = comparison.runs[0].run_id, comparison.runs[1].run_id
    return comparison_json(ids, comparison.rows, comparison.params, comparison.unmatched)


def print_comparison(comparison: Comparison) -> None:
    """The tables, below them what a verdict rests on or why there is none, and at the end the worst of them."""
    rows, (first, second) = comparison.rows, comparison.runs
    Console().print(comparison_tables(rows, comparison.params))
    print()
    for line in (*comparison_notes(rows), *comparison.unmatched):
        print(line)
    if any(one.reason == NOT_IN_TURNS for row in rows for one in row.metrics):
        print(WHY_IN_TURNS)
    print(f"{overall_change(rows)}: {second.title} against {first.title}")
