"""``jetway compare``: two stored runs side by side, from their records in MLflow."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from jetway.configs.load import load_recipe
from jetway.flows.record import RunResult
from jetway.flows.show import find_result
from jetway.tasks.comparison import (
    NOT_IN_TURNS,
    ComparedRow,
    RowPair,
    Scores,
    compare_rows,
    differing_params,
    exit_code,
    match_rows,
    overall_change,
)
from jetway.tasks.comparison_table import comparison_json, comparison_notes, comparison_tables
from jetway.tasks.errors import ConfigError
from jetway.tasks.results import VariantResult
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import RunRecord
from jetway.tasks.workload import Workload, load_workload

WHY_IN_TURNS = (
    "Times of two sessions get no verdict: of 98 pairs of sessions of one engine, a test of their queries found 86 "
    "different. Engines have to be measured in turns, a fresh process each time."
)


@dataclass(frozen=True)
class Comparison:
    """Two stored runs and what changed from the first to the second."""

    runs: tuple[StoredRun, StoredRun]
    rows: list[ComparedRow]
    params: dict[str, tuple[str | None, str | None]]
    #: A line for each row that one run alone has.
    unmatched: list[str]


def compare_runs(
    first: str, second: str, *, margin: float, metrics: Sequence[str] = (), as_json: bool = False
) -> int:
    """Prints what changed from the first run to the second.

    Returns 1 when something regressed, else 5 when something is UNKNOWN, else 0. Raises TrackingError for a run
    that is not there or has no stage table, ConfigError for runs that share no row.
    """
    tracker = Tracker()
    comparison = compare_stored(
        StoredRun(tracker, first), StoredRun(tracker, second), margin=margin, metrics=metrics
    )
    if as_json:
        ids = comparison.runs[0].record.run_id, comparison.runs[1].record.run_id
        print(
            json.dumps(
                comparison_json(ids, comparison.rows, comparison.params, comparison.unmatched), indent=1
            )
        )
    else:
        print_comparison(comparison)
    return exit_code(overall_change(comparison.rows))


def compare_stored(
    first: StoredRun, second: StoredRun, *, margin: float, metrics: Sequence[str] = ()
) -> Comparison:
    """Matches the rows of two runs and judges them. Raises ConfigError when there is nothing to compare."""
    if first.record.run_id == second.record.run_id:
        raise ConfigError(f"Both are run {first.record.run_id[:8]}. Name two runs; MLflow's page lists them.")
    matched, unmatched = match_rows(first.result.rows, second.result.rows)
    pairs = [
        RowPair(before, after, (first.scores(before), second.scores(after))) for before, after in matched
    ]
    rows = compare_rows(pairs, second.result.task_metrics, second.summarize, margin=margin, names=metrics)
    params = differing_params(first.record.params, second.record.params)
    return Comparison((first, second), rows, params, unmatched)


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


class StoredRun:
    """A finished run with its table, and what its child runs keep."""

    def __init__(self, tracker: Tracker, id_or_prefix: str) -> None:
        self.record: RunRecord
        self.record, document = find_result(tracker, id_or_prefix)
        self.result = RunResult.model_validate(document)
        self._tracker = tracker
        self._children = {
            (child.tags.get("variant"), child.tags.get("target")): child.run_id
            for child in tracker.children(self.record.run_id)
        }

    @property
    def title(self) -> str:
        return f"{self.record.run_id[:8]} ({self.record.name})"

    def scores(self, row: VariantResult) -> Scores:
        """The records of a row's engine, and what they were made of."""
        child = self._children[row.variant, row.target]
        handles = self._tracker.files(child)
        engine, *inputs = handles["records.json"].parents
        return Scores(self._tracker.load_json(child, "records.json"), engine, tuple(inputs))

    def summarize(self, records: Sequence[Any]) -> Mapping[str, float]:
        """By the code of the workload as it is today. Raises ConfigError when it cannot be imported here."""
        return self._workload.summarize(records)

    @cached_property
    def _workload(self) -> Workload:
        with tempfile.TemporaryDirectory() as folder:
            path = self._tracker.load_file(self.record.run_id, "recipe.yaml", Path(folder))
            recipe, _ = load_recipe(str(path))
        return load_workload(recipe.workload, search_path=[Path.cwd()])
