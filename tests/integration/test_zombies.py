"""Runs whose process is gone: what the next run tells MLflow and a real Prefect server of them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from httpx import ConnectError

from jetway.flows import zombies
from jetway.flows.pipeline import OBSERVER, Observer
from jetway.flows.record import RESULT_PATH
from jetway.flows.server import Server, prefect_settings, start_server, stop_server
from jetway.flows.zombies import FLOW_RUN_TAG, end_zombies, process_tag
from jetway.tasks.errors import TrackingError
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import HOST_TAG, PROCESS_TAG

pytestmark = pytest.mark.team


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("zombies")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("PREFECT_API_URL", "PREFECT_HOME", "DO_NOT_TRACK", "PREFECT_SERVER_EPHEMERAL_ENABLED"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        with start_server(home=home) as started:
            started.wait_ready()
            yield started
        stop_server(home=home)


@pytest.fixture
def dead_process() -> str:
    """What ``process_id`` was of a process that has ended."""
    code = "from jetway.tasks.environment import process_id; print(process_id())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


class Prefect:
    """Flow runs that are running, as Prefect sees it."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def start_run(self, *tags: str) -> str:
        from prefect import flow
        from prefect.client.orchestration import get_client
        from prefect.states import Running

        @flow(name="made up")
        def nothing() -> None: ...

        with prefect_settings(self.server), get_client(sync_client=True) as client:
            return str(client.create_flow_run(nothing, state=Running(), tags=tags).id)

    def set_crashed(self, flow_run_id: str) -> None:
        from prefect.client.orchestration import get_client
        from prefect.states import Crashed

        with prefect_settings(self.server), get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(flow_run_id), Crashed(), force=True)

    def state(self, flow_run_id: str) -> str:
        from prefect.client.orchestration import get_client

        with prefect_settings(self.server), get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run_id)).state
        assert state is not None
        return str(state.type.value)

    def end_zombies(self, tracker: Tracker) -> None:
        with prefect_settings(self.server):
            end_zombies(tracker)


@pytest.fixture
def prefect(server: Server) -> Prefect:
    return Prefect(server)


@pytest.mark.parametrize(
    ("status", "state"),
    [("FINISHED", "COMPLETED"), ("FAILED", "FAILED"), ("KILLED", "CRASHED"), (None, "CRASHED")],
)
def test_a_flow_run_gets_the_end_that_mlflow_tells_of_its_dead_process(
    prefect: Prefect, dead_process: str, status: str | None, state: str
) -> None:
    tracker = Tracker()
    flow_run_id = prefect.start_run()
    run_id = tracker.start_run("digits", tags={FLOW_RUN_TAG: flow_run_id})
    tracker.set_tags(run_id, {PROCESS_TAG: dead_process})
    if status:
        tracker.finish(run_id, status)  # type: ignore[arg-type]
    prefect.end_zombies(tracker)
    assert prefect.state(flow_run_id) == state
    assert tracker.run(run_id).status == (status or "KILLED")


def test_a_process_that_died_before_it_had_a_run_is_known_by_its_tag(
    prefect: Prefect, dead_process: str
) -> None:
    dead = prefect.start_run(f"{zombies._machine()}{dead_process}")
    alive, elsewhere = prefect.start_run(process_tag()), prefect.start_run("process:0000:1:1")
    prefect.end_zombies(Tracker())
    assert [prefect.state(one) for one in (dead, alive, elsewhere)] == ["CRASHED", "RUNNING", "RUNNING"]


def test_a_run_that_goes_on_is_left_alone(prefect: Prefect) -> None:
    tracker = Tracker()
    flow_run_id = prefect.start_run()
    run_id = tracker.start_run("digits", tags={FLOW_RUN_TAG: flow_run_id})
    prefect.end_zombies(tracker)
    assert (prefect.state(flow_run_id), tracker.run(run_id).status) == ("RUNNING", "RUNNING")


@pytest.mark.parametrize("crashed", [True, False])
def test_another_machines_run_ends_in_mlflow_when_prefect_calls_it_crashed(
    prefect: Prefect, crashed: bool
) -> None:
    tracker = Tracker()
    flow_run_id = prefect.start_run()
    run_id = tracker.start_run("digits", tags={FLOW_RUN_TAG: flow_run_id})
    child = tracker.start_child(run_id, "baseline-fp32")
    for one in (run_id, child):
        tracker.set_tags(one, {HOST_TAG: "elsewhere"})
    if crashed:
        prefect.set_crashed(flow_run_id)
    prefect.end_zombies(tracker)
    ended = "KILLED" if crashed else "RUNNING"
    assert [tracker.run(one).status for one in (run_id, child)] == [ended, ended]


def test_a_prefect_that_is_away_stops_nothing(
    dead_process: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker()
    run_id = tracker.start_run("digits")
    tracker.set_tags(run_id, {PROCESS_TAG: dead_process})
    with prefect_settings(Server("http://127.0.0.1:9/api")):
        end_zombies(tracker)
    assert tracker.run(run_id).status == "KILLED"
    assert "Prefect was not asked" in caplog.text


@pytest.mark.parametrize("finished", [True, False])
def test_a_result_outlives_the_prefect_server_that_could_not_be_told(
    finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jetway.flows import run

    def loses_its_server(*_: object) -> None:
        raise ConnectError("Connection refused")

    tracker, observer = Tracker(), Observer()
    run_id = tracker.start_run("digits")
    observer.on_start(run_id)
    if finished:
        result = run.RunResult(run_id=run_id, exit_code=1, rows=(), task_metrics=())
        tracker.log_json(run_id, RESULT_PATH, result.model_dump(mode="json"))
        tracker.finish(run_id, "FINISHED")
    monkeypatch.setattr(run, "deploy", loses_its_server)
    token = OBSERVER.set(observer)
    try:
        if finished:
            told = run.call_flow(Server("http://127.0.0.1:9/api"), "digits", None, [], None)
            assert (told.run_id, told.exit_code) == (run_id, 1)
        else:
            with pytest.raises(TrackingError, match=r"ConnectError.*the same command goes on"):
                run.call_flow(Server("http://127.0.0.1:9/api"), "digits", None, [], None)
    finally:
        OBSERVER.reset(token)
