"""A night made known: its record in MLflow, and for each recipe and target a Prefect artifact and event."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import TypeVar

from httpx import HTTPError
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.exceptions import PrefectException

from jetway.flows.record import SIMULATED, validity_of, worst_gate
from jetway.tasks.comparison import EXACT_METRICS
from jetway.tasks.duel import METRIC, DuelResult
from jetway.tasks.errors import TrackingError
from jetway.tasks.gates import EXIT_GATE_MISSED
from jetway.tasks.history import NIGHTS_SHOWN, Series, read_series
from jetway.tasks.nightly import NightResult, NightRow, night_figures, night_markdown, row_markdown
from jetway.tasks.report.nightly_page import NightMaterial, night_html
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import NIGHTS, RunRecord
from jetway.tasks.verdict import Change

logger = logging.getLogger("jetway")

EVENT_PREFIX = "jetway.verdict."
PAGE_PATH = "nightly.html"
RESULT_PATH = "nightly.json"

Answer = TypeVar("Answer")


def announce(row: NightRow, night_id: str) -> None:
    """To Prefect: an artifact to read, and an event that automations act on. Where it is away, the night stands."""
    for publish in (partial(publish_artifact, row), partial(emit_verdict, row, night_id)):
        try:
            publish()
        except (HTTPError, PrefectException) as exc:
            logger.warning("Prefect was not told of %s: %s: %s", row.name, type(exc).__name__, exc)


def publish_artifact(row: NightRow) -> None:
    """The verdict as a table, the newest of its recipe and target under one key."""
    create_markdown_artifact(row_markdown(row), key=artifact_key(row), description=row.sentence)


def artifact_key(row: NightRow) -> str:
    """``nightly-digits-loopback``; Prefect takes small letters, figures and dashes."""
    return re.sub("[^a-z0-9]+", "-", f"nightly-{row.recipe}-{row.target}".lower()).strip("-")


def event_name(row: NightRow) -> str:
    """``jetway.verdict.regressed`` and its like; ``missed`` where a gate failed, but no metric REGRESSED."""
    told = row.status in (Change.REGRESSED, "FAILED")
    missed = row.exit_code == EXIT_GATE_MISSED and not told
    return f"{EVENT_PREFIX}{'missed' if missed else row.status.lower()}"


def emit_verdict(row: NightRow, night_id: str) -> None:
    """An event of the verdict, whose resource is a recipe on a class of targets."""
    changes = row.compared.metrics if row.compared else ()
    emit_event(
        event=event_name(row),
        resource={
            "prefect.resource.id": f"jetway.recipe.{row.recipe}.{row.target_class}",
            "prefect.resource.name": row.name,
            "jetway.recipe": row.recipe,
            "jetway.target": row.target,
            "jetway.target_class": row.target_class,
        },
        payload={
            "message": row.sentence,
            "verdicts": {one.metric: str(one.change) for one in changes},
            "exit_code": row.exit_code,
            "run_id": row.run_id,
            "night_run_id": night_id,
        },
    )


def log_row(tracker: Tracker, night_id: str, row: NightRow, duel: DuelResult | None) -> None:
    """A child of the night's run: verdict as tags, figures for the history, every run of the duel."""
    simulated = row.candidate is not None and row.candidate.simulated
    run_id = tracker.start_comparison(night_id, f"{row.name}{SIMULATED if simulated else ''}", tags_of(row))
    tracker.log_metrics(run_id, night_figures(row))
    tracker.log_json(run_id, "verdict.json", row.model_dump(mode="json"))
    if duel:
        tracker.log_json(run_id, "duel.json", duel.model_dump(mode="json"))
    tracker.describe(run_id, f"{row_markdown(row)}\n\n{links_of(tracker, row)}")
    tracker.finish(run_id, "FAILED" if row.status == "FAILED" else "FINISHED")


def tags_of(row: NightRow) -> dict[str, str]:
    tags = {
        "recipe": row.recipe,
        "target": row.target,
        "target_class": row.target_class,
        "verdict": row.status,
        "candidate_run_id": row.run_id,
    }
    if row.champion:
        tags |= {"champion_run_id": row.champion.run_id, "champion_version": str(row.champion.version)}
    if row.candidate:
        tags |= {
            "variant": row.candidate.variant,
            "board": row.candidate.board,
            "validity": validity_of([row.candidate]),
            "gate": worst_gate([row.candidate]),
            **({"simulated": "true"} if row.candidate.simulated else {}),
        }
    if row.promoted:
        tags["promoted"] = str(row.promoted.version)
    return tags


def links_of(tracker: Tracker, row: NightRow) -> str:
    """To the runs of both sides."""
    runs = {"candidate": row.run_id, "champion": row.champion.run_id if row.champion else ""}
    pages = {name: asked(partial(tracker.page_of_run, run_id), "") for name, run_id in runs.items() if run_id}
    return ", ".join(f"[{name}]({page})" for name, page in pages.items() if page)


def asked(question: Callable[[], Answer], otherwise: Answer) -> Answer:
    """What MLflow answers. Where it does not, the record of a night goes on without: its writes are spooled."""
    try:
        return question()
    except TrackingError as exc:
        logger.warning("the night's record lacks something: %s", exc)
        return otherwise


def log_night(
    tracker: Tracker, result: NightResult, duels: Mapping[str, DuelResult], started: datetime
) -> None:
    """The verdicts first; then a child run for each recipe and target, and the night's tags, page and description."""
    tracker.log_json(result.run_id, RESULT_PATH, result.model_dump(mode="json"))
    for row in result.rows:
        log_row(tracker, result.run_id, row, duels.get(row.name))
    statuses = sorted({row.status for row in result.rows})
    tracker.set_tags(result.run_id, {"verdict": ", ".join(statuses), "exit_code": str(result.exit_code)})
    log_page(tracker, result, started)
    parts = (result.message, link_of_page(tracker, result.run_id), night_markdown(result.rows))
    tracker.describe(result.run_id, "\n\n".join(filter(None, parts)))


def link_of_page(tracker: Tracker, night_id: str) -> str:
    page = asked(partial(tracker.page_of, night_id, PAGE_PATH), "")
    return f"[The page of the night]({page}) has charts of the nights before." if page else ""


def log_page(tracker: Tracker, result: NightResult, started: datetime) -> None:
    """A page that cannot be drawn is a bug of ours and told as an error, but a night's verdicts stand without it."""
    try:
        history = {row.name: history_of(tracker, row) for row in result.rows}
        page = night_html(NightMaterial(started, result, history))
    except Exception:
        logger.exception("night %s has no page, because it cannot be drawn", result.run_id[:8])
        return
    tracker.log_text(result.run_id, PAGE_PATH, page)


def history_of(tracker: Tracker, row: NightRow) -> list[Series]:
    """Every figure of the recipe on the target over the nights up to this one; boards of a class differ."""
    query = f"tags.recipe = '{row.recipe}' AND tags.target = '{row.target}'"
    nights: list[RunRecord] = asked(partial(tracker.search, query, experiment=NIGHTS, limit=NIGHTS_SHOWN), [])
    return read_series(nights, (METRIC, *(metric.name for metric in row.task_metrics), *EXACT_METRICS))
