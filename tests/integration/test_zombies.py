"""Runs whose process is gone: what the next run tells MLflow and a real Prefect server of them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from conftest import ROOT
from doubles.servers import PrefectServer
from httpx import ConnectError
from prefect.client.schemas.objects import State
from prefect.states import Completed, Crashed

from jetway.flows import zombies
from jetway.flows.pipeline import OBSERVER, Observer
from jetway.flows.record import RESULT_PATH
from jetway.flows.server import Server, prefect_settings, start_server, stop_server
from jetway.flows.zombies import FLOW_RUN_TAG, TEAM_TAG, end_zombies, process_tag
from jetway.tasks.errors import TrackingError
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import HOST_TAG, PROCESS_TAG

pytestmark = pytest.mark.team

AUTOMATIONS = ROOT / "configs/automations.yaml"


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

    def start_run(self, *tags: str, state: str = "Running") -> str:
        from prefect import flow, states
        from prefect.client.orchestration import get_client

        @flow(name="made up")
        def nothing() -> None: ...

        with prefect_settings(self.server), get_client(sync_client=True) as client:
            return str(client.create_flow_run(nothing, state=getattr(states, state)(), tags=tags).id)

    def start_deployed(self, tag: str, state: str) -> str:
        """As a worker leaves it that starts what a deployment wants."""
        from prefect import states
        from prefect.client.orchestration import get_client

        with prefect_settings(self.server), get_client(sync_client=True) as client:
            flow_id = client.create_flow_from_name("deployed")
            deployment = client.create_deployment(flow_id, f"with {tag}", tags=[tag])
            created = client.create_flow_run_from_deployment(deployment, state=getattr(states, state)())
        return str(created.id)

    def set_state(self, flow_run_id: str, state: State) -> None:
        from prefect.client.orchestration import get_client

        with prefect_settings(self.server), get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(flow_run_id), state, force=True)

    def state(self, flow_run_id: str) -> str:
        from prefect.client.orchestration import get_client

        with prefect_settings(self.server), get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run_id)).state
        assert state is not None
        return str(state.type.value)

    def begin(self, flow_run_id: str) -> None:
        """As the process does that a worker has started."""
        from prefect import flow
        from prefect.client.orchestration import get_client
        from prefect.flow_engine import run_flow

        @flow(name="deployed")
        def nothing() -> None: ...

        with prefect_settings(self.server):
            with get_client(sync_client=True) as client:
                flow_run = client.read_flow_run(UUID(flow_run_id))
            run_flow(nothing, flow_run=flow_run)

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


def test_a_flow_run_that_was_made_twice_ends_when_its_twin_begins(
    prefect: Prefect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server died between making it and saying so: the run's own process has a second one by then."""
    twin, own = (prefect.start_run(process_tag(), state=state) for state in ("Pending", "Running"))
    monkeypatch.setattr(zombies, "PENDING_S", 60.0)
    prefect.end_zombies(Tracker())
    assert (prefect.state(twin), prefect.state(own)) == ("PENDING", "RUNNING")
    monkeypatch.setattr(zombies, "PENDING_S", 0.0)
    prefect.end_zombies(Tracker())
    assert (prefect.state(twin), prefect.state(own)) == ("CRASHED", "RUNNING")


def test_what_stays_pending_on_another_machine_ends_with_the_next_run(
    prefect: Prefect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a command by its tag, of a deployment by the team's; not what others have on the same server."""
    tags = ("process:0000:1:1", TEAM_TAG, "of others")
    pending, running = (
        [prefect.start_run(tag, state=state) for tag in tags] for state in ("Pending", "Running")
    )
    prefect.end_zombies(Tracker())
    assert [prefect.state(one) for one in pending] == ["PENDING"] * 3
    monkeypatch.setattr(zombies, "BEGIN_S", 0.0)
    prefect.end_zombies(Tracker())
    assert [prefect.state(one) for one in pending] == ["CRASHED", "CRASHED", "PENDING"]
    assert [prefect.state(one) for one in running] == ["RUNNING"] * 3


@pytest.mark.filterwarnings("default")
def test_what_begins_after_it_was_called_crashed_runs_all_the_same(prefect: Prefect) -> None:
    late = prefect.start_deployed(TEAM_TAG, state="Pending")
    prefect.set_state(late, Crashed())
    prefect.begin(late)
    assert prefect.state(late) == "COMPLETED"


@pytest.fixture(scope="module")
def team_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Prefect server that knows the automations."""
    process = PrefectServer(tmp_path_factory.mktemp("team's prefect"))
    process.start()
    command = [sys.executable, "-m", "prefect", "automation", "create", "--from-file", AUTOMATIONS]
    subprocess.run(command, env=os.environ | {"PREFECT_API_URL": process.api_url}, check=True)
    yield Server(process.api_url)
    process.kill()


def test_what_dies_before_its_first_heartbeat_is_crashed_by_the_automation(team_server: Server) -> None:
    """Pending, or just begun: what a worker leaves that was killed, and no run comes after it."""
    prefect = Prefect(team_server)
    killed = {state: prefect.start_deployed(TEAM_TAG, state=state) for state in ("Pending", "Running")}
    left_alone = [
        prefect.start_deployed("of others", state="Pending"),
        prefect.start_run(TEAM_TAG, state="Running"),
        prefect.start_deployed(TEAM_TAG, state="Pending"),
    ]
    began_s = time.monotonic()
    prefect.set_state(left_alone[-1], Completed())
    ended_s = {}
    while len(ended_s) < len(killed):
        for state in killed.keys() - ended_s.keys():
            if prefect.state(killed[state]) == "CRASHED":
                ended_s[state] = time.monotonic() - began_s
        assert time.monotonic() - began_s < 120
        time.sleep(0.5)
    print({state: f"crashed after {seconds:.1f} s" for state, seconds in ended_s.items()})
    assert [prefect.state(one) for one in left_alone] == ["PENDING", "RUNNING", "COMPLETED"]


def test_a_run_that_goes_on_is_left_alone(prefect: Prefect) -> None:
    tracker = Tracker()
    flow_run_id = prefect.start_run()
    run_id = tracker.start_run("digits", tags={FLOW_RUN_TAG: flow_run_id})
    prefect.end_zombies(tracker)
    assert (prefect.state(flow_run_id), tracker.run(run_id).status) == ("RUNNING", "RUNNING")
    prefect.set_state(flow_run_id, Crashed())
    prefect.end_zombies(tracker)
    assert tracker.run(run_id).status == "RUNNING", "Prefect errs: its process lives"


@pytest.mark.parametrize(("crashed", "of_night"), [(True, False), (True, True), (False, False)])
def test_another_machines_run_ends_in_mlflow_when_prefect_calls_it_crashed(
    prefect: Prefect, crashed: bool, of_night: bool
) -> None:
    tracker = Tracker()
    flow_run_id = prefect.start_run()
    tags = {FLOW_RUN_TAG: flow_run_id}
    run_id = tracker.start_night("night", {}, tags) if of_night else tracker.start_run("digits", tags=tags)
    child = tracker.start_child(run_id, "baseline-fp32")
    for one in (run_id, child):
        tracker.set_tags(one, {HOST_TAG: "elsewhere"})
    if crashed:
        prefect.set_state(flow_run_id, Crashed())
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
    finished: bool, server: Server, monkeypatch: pytest.MonkeyPatch
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
            told = run.call_flow(server, "digits", None, [], None)
            assert (told.run_id, told.exit_code) == (run_id, 1)
        else:
            with pytest.raises(TrackingError, match=r"ConnectError.*the same command goes on"):
                run.call_flow(server, "digits", None, [], None)
    finally:
        OBSERVER.reset(token)
