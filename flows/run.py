"""``jetway run``: the deploy flow with a live terminal, the table at the end, and the exit code."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterable
from typing import Any

from httpx import HTTPError
from prefect import tags
from prefect.exceptions import PrefectException

from jetway.configs.load import load_recipe, load_targets
from jetway.flows.check import check_without_targets
from jetway.flows.deploy import deploy
from jetway.flows.failure import Failure
from jetway.flows.pipeline import OBSERVER, Observer, observing
from jetway.flows.record import REPORT_PATH, RESULT_PATH, RunResult
from jetway.flows.server import Server, meet_server, prefect_settings
from jetway.flows.show import print_result
from jetway.flows.terminal import Terminal
from jetway.flows.zombies import process_tag
from jetway.tasks.errors import FleetError, JetwayError, TrackingError, TrackingUnreachableError
from jetway.tasks.stage import FinishedStage
from jetway.tasks.table import run_json
from jetway.tasks.target.jobs import interrupt_jobs
from jetway.tasks.tracking.tracker import Tracker

logger = logging.getLogger("jetway")

#: What is told of a bug of ours; its traceback follows.
UNEXPECTED = Failure("FAILED", JetwayError.exit_code, "unexpected: the traceback on stderr says more")


class TerminalObserver(Observer):
    """Shows a run on the terminal as it goes."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self.terminal = terminal
        self.progress = terminal

    def on_finish(self, stage: FinishedStage) -> None:
        super().on_finish(stage)
        self.terminal.finish_stage(stage.name, stage.seconds, stage.cached)


def run_deploy(
    server: Server,
    recipe: str,
    targets: list[str] | None,
    overrides: list[str],
    *,
    busy_timeout_s: float | None = None,
    as_json: bool,
    started_s: float,
) -> int:
    """Runs the flow to its end and returns the exit code. ``started_s`` is when the process started.

    With ``as_json`` a run that fails is told here, as the stages that it finished are part of it; else it raises.
    """
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    terminal = Terminal()
    observer = TerminalObserver(terminal)
    result: RunResult | None = None
    failure: Failure | None = UNEXPECTED
    try:
        with terminal, observing(observer), server:
            check_inputs(server, recipe, targets, overrides)
            server.wait_ready()
            result = call_flow(server, recipe, targets, overrides, busy_timeout_s)
            failure = None
    except FleetError as exc:
        result, failure = exc.result, Failure.of(exc)
    except (JetwayError, KeyboardInterrupt) as exc:
        failure = Failure.of(exc)
        if not as_json:
            raise
    finally:
        overhead_s = time.monotonic() - started_s - busy_s(observer.stages)
        if as_json:
            print(json.dumps(document(observer, result, failure, overhead_s), indent=1))
    if result and not as_json:
        print()
        print_result(result)
        print(
            f"\nOrchestration and tracking took {overhead_s:.1f} s beside the stages. "
            f"Look closer: jetway show {observer.run_id[:8]}, jetway ui\n{report_line(observer.run_id)}",
            flush=True,
        )
    if failure:
        failure.tell()
    return exit_code_of(failure, result)


def exit_code_of(*ends: Failure | RunResult | None) -> int:
    """That of the first one there is."""
    return next(end.exit_code for end in ends if end)


def report_line(run_id: str) -> str:
    """Where the run's report lies, or how to get it where MLflow keeps it on another machine."""
    try:
        folder = Tracker().local_folder(run_id)
    except TrackingUnreachableError:
        folder = None
    return f"Report: {folder / REPORT_PATH if folder else f'jetway report {run_id[:8]}'}"


def interrupt(signum: int, frame: Any) -> None:
    """Ctrl-C reaches the main thread alone; the jobs that other threads follow must end too."""
    interrupt_jobs()
    raise KeyboardInterrupt


def check_inputs(server: Server, recipe_name: str, targets: list[str] | None, overrides: list[str]) -> None:
    """Raises for what can be known to be wrong before a run exists, and then leaves nothing started."""
    try:
        recipe, path = load_recipe(recipe_name, overrides)
        load_targets(targets or recipe.targets, near=path)
        check_without_targets(recipe, path)
    except JetwayError:
        server.stop_if_spawned()
        raise


def call_flow(
    server: Server,
    recipe: str,
    targets: list[str] | None,
    overrides: list[str],
    busy_timeout_s: float | None,
) -> RunResult:
    try:
        with prefect_settings(server), tags(process_tag()):
            meet_server()
            return deploy(recipe, targets, overrides, busy_timeout_s)
    except (PrefectException, HTTPError) as exc:
        result = recorded_result(run_id=current_run_id())
        if result is None:
            raise TrackingError(
                f"Prefect at {server.api_url} failed: {type(exc).__name__}: {exc}. Check that server; "
                "finished stages are kept, and the same command goes on from them."
            ) from exc
        logger.warning("Prefect at %s was not told that the run finished (%s); the next run tells it",
                       server.api_url, exc)  # fmt: skip
        return result


def current_run_id() -> str:
    observer = OBSERVER.get()
    return observer.run_id if observer else ""


def recorded_result(run_id: str) -> RunResult | None:
    """What a flow returned that finished, though Prefect could not be told."""
    if not run_id or Tracker().run(run_id).status != "FINISHED":
        return None
    return RunResult.model_validate(Tracker().load_json(run_id, RESULT_PATH))


def busy_s(stages: Iterable[FinishedStage]) -> float:
    """Seconds in which at least one stage was at work."""
    total = last_s = 0.0
    for stage in sorted(stages, key=lambda stage: stage.started_s):
        total += max(0.0, stage.ended_s - max(stage.started_s, last_s))
        last_s = max(last_s, stage.ended_s)
    return total


def document(
    observer: Observer, result: RunResult | None, failure: Failure | None, overhead_s: float
) -> dict[str, object]:
    """What ``--json`` prints; a fleet has both, a result of some targets and a failure that names the others."""
    stages = [(stage.name, stage.seconds, stage.cached) for stage in observer.stages]
    status = failure.status if failure else "FINISHED"
    exit_code = exit_code_of(failure, result)
    rows, targets = (result.rows, result.targets) if result else ((), ())
    told = run_json(observer.run_id, status, exit_code, stages, overhead_s, rows, targets)
    told["ladder"] = [rung.model_dump(mode="json") for rung in result.ladder] if result else []
    return {**told, "error": failure.error} if failure else told
