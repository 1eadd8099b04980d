"""``jetway show``: the stage table of a finished run, from its record in MLflow."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from jetway.flows.record import RESULT_PATH, RunResult
from jetway.tasks.errors import TrackingError
from jetway.tasks.ladder import ladder_table
from jetway.tasks.results import without_result
from jetway.tasks.table import outcome_line, stage_table, table_notes
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import RunRecord


def show_run(id_or_prefix: str, *, as_json: bool) -> None:
    """Prints the table, or the JSON that the run printed with ``--json``; ``latest`` is the newest with a table.

    Raises TrackingError when there is no such run, or it ended before it had a table.
    """
    _, document = find_result(Tracker(), id_or_prefix)
    if as_json:
        print(json.dumps(document, indent=1))
        return
    print_result(RunResult.model_validate(document))


def find_result(tracker: Tracker, id_or_prefix: str) -> tuple[RunRecord, Any]:
    """A run and the JSON of its result; ``latest`` is the newest with a table.

    Raises TrackingError when there is no such run, or it ended before it had a table.
    """
    latest = id_or_prefix == "latest"
    run = tracker.newest_run_with(RESULT_PATH) if latest else tracker.find_run(id_or_prefix)
    try:
        return run, tracker.load_json(run.run_id, RESULT_PATH)
    except TrackingError as exc:
        error = run.tags.get("error", "it did not get that far")
        raise TrackingError(f"Run {run.run_id[:8]} is {run.status} and has no stage table: {error}") from exc


def print_result(result: RunResult) -> None:
    """The stage table, and below it what is invalid and which gates did not pass."""
    console = Console()
    console.print(stage_table(result.rows, result.task_metrics, width=console.width))
    if result.ladder:
        console.print(ladder_table(result.ladder))
    for note in [*table_notes(result.rows), *map(outcome_line, without_result(result.targets))]:
        console.print(note, highlight=False, soft_wrap=True)
