"""A night made known: its record in MLflow, on sqlite."""

import json
import logging

import pytest
from doubles.finished_night import LAST_NIGHT, make_candidate, make_row
from doubles.mute_tracker import MuteTracker
from httpx import ConnectError, Request, Response
from prefect.exceptions import PrefectHTTPStatusError

from jetway.flows import publish
from jetway.flows.publish import RESULT_PATH, announce, artifact_key, history_of, log_night, log_row
from jetway.tasks.errors import TrackingError
from jetway.tasks.nightly import NightResult, NightRow
from jetway.tasks.tracking.tracker import Tracker


@pytest.fixture
def tracker():
    return Tracker()


def row_of(board, latency_ms):
    candidate = make_candidate().model_copy(
        update={"target": board, "metrics": {"latency_ms_p50": latency_ms}}
    )
    return make_row().model_copy(
        update={"target": board, "run_id": "", "champion": None, "candidate": candidate}
    )


def test_boards_of_a_class_have_a_series_each(tracker):
    rows = [row_of("bench", 1.0), row_of("field", 2.0)]
    for _ in range(2):
        night_id = tracker.start_night("a night", {})
        for row in rows:
            log_row(tracker, night_id, row, None)
    (bench,), (field,) = (history_of(tracker, row) for row in rows)
    assert [point.value for point in bench.points] == [1.0, 1.0]
    assert [point.value for point in field.points] == [2.0, 2.0]


def test_record_of_a_night_goes_on_where_mlflow_answers_nothing(tracker, tmp_path):
    mute = MuteTracker()
    rows = (row_of("bench", 1.0).model_copy(update={"run_id": "c" * 32}),)
    result = NightResult(run_id=mute.start_night("a night", {}), rows=rows)
    mute.away = True
    log_night(mute, result, {}, LAST_NIGHT)
    assert NightResult.model_validate(tracker.load_json(result.run_id, RESULT_PATH)) == result
    (child,) = tracker.children(result.run_id)
    assert child.tags["verdict"] == "REGRESSED"
    page = tracker.load_file(result.run_id, "nightly.html", tmp_path).read_text()
    assert "digits on bench REGRESSED" in page
    assert "Night of 2026-11-21" in page, "the day on which it began"
    assert tracker.run(result.run_id).tags["mlflow.note.content"].startswith(result.message)


class Refusing(Tracker):
    """Takes no record of a comparison."""

    def start_comparison(self, *_):
        raise TrackingError("no room")


def test_verdicts_are_recorded_before_all_else(tracker):
    refusing = Refusing()
    result = NightResult(run_id=refusing.start_night("a night", {}), rows=(row_of("bench", 1.0),))
    with pytest.raises(TrackingError, match="no room"):
        log_night(refusing, result, {}, LAST_NIGHT)
    assert tracker.load_json(result.run_id, RESULT_PATH) == json.loads(result.model_dump_json())


@pytest.mark.parametrize("error", [ConnectError("no route"), PrefectHTTPStatusError])
def test_event_goes_out_where_the_artifact_does_not(error, monkeypatch, caplog):
    """Which client of Prefect's fails, and how, is Prefect's own; here its functions do."""
    if isinstance(error, type):
        request = Request("POST", "http://prefect/api")
        error = error("as asked", request=request, response=Response(500, request=request))
    events = []

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(publish, "create_markdown_artifact", refuse)
    monkeypatch.setattr(publish, "emit_event", lambda **event: events.append(event["event"]))
    with caplog.at_level(logging.WARNING, "jetway"):
        announce(make_row(), "f" * 32)
    assert events == ["jetway.verdict.regressed"]
    assert "Prefect was not told of digits on bench" in caplog.text
    monkeypatch.setattr(publish, "emit_event", refuse)
    announce(make_row(), "f" * 32)


def test_record_of_a_recipe_that_could_not_be_read(tracker):
    row = NightRow(recipe="a/broken.yaml", target="", target_class="", error="epochs", error_exit_code=2)
    result = NightResult(run_id=tracker.start_night("a night", {}), rows=(row,))
    log_night(tracker, result, {}, LAST_NIGHT)
    (child,) = tracker.children(result.run_id)
    assert (child.name, child.status, child.tags["verdict"]) == ("a/broken.yaml", "FAILED", "FAILED")
    assert tracker.has_file(result.run_id, "nightly.html")
    assert artifact_key(row) == "nightly-a-broken-yaml"
