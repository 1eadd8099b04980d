"""``jetway nightly``: the nightly flow with a live terminal, tables of verdicts, and the exit code."""

from __future__ import annotations

import json
import signal
from typing import Any

from httpx import HTTPError
from prefect import tags
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectException
from rich.console import Console

from jetway.flows.nightly import nightly
from jetway.flows.pipeline import observing
from jetway.flows.publish import RESULT_PATH
from jetway.flows.run import TerminalObserver, check_inputs, current_run_id, interrupt
from jetway.flows.server import Server, prefect_settings
from jetway.flows.terminal import Terminal
from jetway.flows.zombies import process_tag
from jetway.tasks.comparison_table import comparison_notes, comparison_tables
from jetway.tasks.errors import TrackingError
from jetway.tasks.nightly import NightResult, Policy
from jetway.tasks.tracking.tracker import Tracker


def run_nightly(
    server: Server,
    recipes: list[str],
    targets: list[str] | None,
    overrides: list[str],
    *,
    policy: Policy,
    budget_minutes: float,
    as_json: bool,
) -> int:
    """Runs the flow to its end, prints what it says and returns the exit code."""
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    terminal = Terminal()
    with terminal, observing(TerminalObserver(terminal)), server:
        for recipe in recipes:
            check_inputs(server, recipe, targets, overrides)
        server.wait_ready()
        result = call_flow(server, recipes, targets, overrides, policy, budget_minutes)
    if as_json:
        print(json.dumps(document(result), indent=1))
    else:
        print_night(result)
    return result.exit_code


def call_flow(
    server: Server,
    recipes: list[str],
    targets: list[str] | None,
    overrides: list[str],
    policy: Policy,
    budget_minutes: float,
) -> NightResult:
    """Raises what the flow raises; a night that ends red does not raise."""
    try:
        with prefect_settings(server), tags(process_tag()):
            state: State[Any] = nightly(
                recipes, targets, overrides, policy, budget_minutes, return_state=True
            )
            result = state.result(raise_on_failure=False)
    except (PrefectException, HTTPError) as exc:
        if recorded := recorded_night(current_run_id()):
            return recorded
        raise TrackingError(
            f"Prefect at {server.api_url} failed: {type(exc).__name__}: {exc}. Check that server; "
            "finished stages are kept, and the same command goes on from them."
        ) from exc
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, NightResult)
    return result


def recorded_night(run_id: str) -> NightResult | None:
    """What a night came to that was over, though Prefect could not be told."""
    tracker = Tracker()
    if not run_id or not tracker.has_file(run_id, RESULT_PATH):
        return None
    return NightResult.model_validate(tracker.load_json(run_id, RESULT_PATH))


def document(result: NightResult) -> dict[str, object]:
    """The one object that ``--json`` prints."""
    rows = [{**row.model_dump(mode="json"), "status": row.status} for row in result.rows]
    dumped = result.model_dump(mode="json")
    return {**dumped, "exit_code": result.exit_code, "message": result.message, "rows": rows}


def print_night(result: NightResult) -> None:
    """A table a comparison, below them what each verdict rests on, and a line for each recipe and target."""
    compared = result.compared()
    if compared:
        Console().print(comparison_tables(compared, {}, ("champion", "tonight")))
    print()
    for line in comparison_notes(compared):
        print(line)
    for row in result.rows:
        print(row.sentence)
        for note in row.notes:
            print(f"  {note}")
        if row.promoted:
            print(f"  promoted: {row.promoted.title} is the champion now")
