"""A team's servers and workers, set up by the commands of the README, and eight deploy runs at once.

The slow tests show that what is asserted of the eight runs turns red. Run once: without the lease up to six jobs
had the accelerator at a time; without the queue all eight runs failed; when MLflow was away for more than a minute,
none of 11 measurements was lost, and without the replay all of them were.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import readme_block
from doubles.postgres import Postgres, running_postgres
from doubles.record import assert_no_overlap, assert_recorded_once, holds
from doubles.servers import free_port
from doubles.team import (
    START_TIMEOUT_S,
    Commands,
    PrefectApi,
    copy_without,
    end_group,
    kill_processes,
    make_schedulable,
)

from jetway.flows.record import RESULT_PATH
from jetway.tasks.on_device import lease
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import HOST_TAG

pytestmark = [pytest.mark.team, pytest.mark.serial, pytest.mark.filterwarnings("default")]

PASSWORD = "it's $ecret"
BOARDS = ("board-1", "board-2", "board-3")
#: Targets of the eight runs: each board alone and with others, so that every board is wanted by several.
EIGHT = [
    ["board-1"],
    ["board-2"],
    ["board-3"],
    ["board-1"],
    ["board-2"],
    ["board-3"],
    list(BOARDS),
    ["board-1", "board-3"],
]
SESSIONS = sum(map(len, EIGHT))
RUNS_TIMEOUT_S = 300


class Team(Commands):
    """A team's servers, at addresses of the test's own."""

    def __init__(self, folder: Path, project: Path, postgres: Postgres) -> None:
        ports = {"MLFLOW_PORT": str(free_port()), "PREFECT_PORT": str(free_port())}
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{postgres.bin}:{os.environ['PATH']}",
            "PGHOST": str(postgres.folder), "PGPORT": str(postgres.port), "PGUSER": "postgres",
            "DATABASE_PASSWORD": PASSWORD, "ARTIFACTS": str(folder / "artifacts"),
            "DATABASE": f"jetway:it%27s%20%24ecret@127.0.0.1:{postgres.port}", "TEAM_HOST": "127.0.0.1", **ports,
        }  # fmt: skip
        super().__init__(folder, project, environment, addresses(ports))
        self.mlflow = f"http://127.0.0.1:{ports['MLFLOW_PORT']}"
        self.prefect = PrefectApi(f"http://127.0.0.1:{ports['PREFECT_PORT']}/api")

    def start_servers(self) -> None:
        self.start_mlflow()
        prefect = self.start("team prefect server", "prefect.log")
        self.wait_ready(f"{self.prefect.url}/health", prefect)
        self.wait_ready(f"{self.mlflow}/health", self.mlflow_process)

    def start_mlflow(self) -> None:
        self.mlflow_process = self.start("team mlflow server", "mlflow.log")

    def wait_ready(self, url: str, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with suppress(OSError), urllib.request.urlopen(url, timeout=5):
                return
            assert process.poll() is None, self.tails()
            assert time.monotonic() < deadline, self.tails()
            time.sleep(0.2)

    def submit(self, targets: list[str], **parameters: Any) -> str:
        return self.prefect.submit(recipe="my_recipe.yaml", targets=targets, **parameters)


def addresses(ports: dict[str, str]) -> str:
    """The README's block of addresses, with those of the test instead."""
    block = readme_block("team addresses")
    ours = {
        "10.0.0.5": "127.0.0.1",
        "=5000": f"={ports['MLFLOW_PORT']}",
        "=4200": f"={ports['PREFECT_PORT']}",
    }
    for theirs, our in ours.items():
        assert theirs in block
        block = block.replace(theirs, our)
    return block


@pytest.fixture
def team_project(project: Path) -> Path:
    """The README's project at its smallest, three boards, and what comes with Jetway to schedule it."""
    recipe = yaml.safe_load((project / "my_recipe.yaml").read_text())
    recipe["workload"]["options"] = {"width": 16}
    recipe |= {"variants": ["baseline-fp32"], "gates": [], "targets": list(BOARDS)}
    recipe |= {"train": {"epochs": 1, "learning_rate": 3e-3}}
    recipe["benchmark"] = {"min_duration_s": 0.5, "min_queries": 100, "max_extensions": 0}
    (project / "my_recipe.yaml").write_text(yaml.safe_dump(recipe))
    (project / "targets").mkdir()
    for board in BOARDS:
        # On two cores shared by eight runs a session is seldom VALID, and none may be left out for that.
        target = {"name": board, "kind": "loopback", "orphan_grace_s": 5, "quarantine_after": 0}
        (project / f"targets/{board}.yaml").write_text(yaml.safe_dump(target))
    make_schedulable(project)
    return project


@pytest.fixture
def team(tmp_path: Path, team_project: Path) -> Iterator[Team]:
    """The servers run and know the deployments; no worker yet."""
    with running_postgres() as postgres:
        team = Team(tmp_path, team_project, postgres)
        try:
            team.run("team databases")
            team.start_servers()
            team.run("team deployments")
            yield team
        finally:
            team.stop()


def run_of(tracker: Tracker, flow_run: str, timeout_s: float = 60) -> str:
    """Id of the run that a flow run has made in MLflow."""
    deadline = time.monotonic() + timeout_s
    while not (found := tracker.search(f"tags.`prefect.flow_run_id` = '{flow_run}'")):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    (run,) = found
    return run.run_id


def wait_for_benchmark() -> None:
    """Until one job has held the lease for longer than a build does."""
    path = lease.lease_path("cpu", lease.directory())
    held_s, job, deadline = time.monotonic(), "", time.monotonic() + 120
    while time.monotonic() - held_s < 15:
        assert time.monotonic() < deadline
        holder = (lease.read_holder(path) or {}).get("job", "")
        if not holder or holder != job:
            held_s, job = time.monotonic(), holder
        time.sleep(0.5)


def accelerator_held() -> AbstractContextManager[Any]:
    """Meanwhile every run that wants a target waits."""
    return lease.held("cpu", job="test", timeout_s=30, wait=lambda seconds, holder: time.sleep(seconds))


class Eight:
    """Eight deploy runs at once by two workers, what must be true of them, and how it is taken away."""

    def __init__(self, team: Team, **variables: str) -> None:
        self.team, self.tracker = team, Tracker(team.mlflow)
        team.start_worker("worker-1", **variables)
        assert team.prefect.wait([team.submit(["board-1"])]) == ["COMPLETED"], team.tails()
        self.stages = len(self.tracker.search("", experiment="jetway-stages"))
        assert not self.store("worker-2").exists()
        team.start_worker("worker-2", **variables)

    def start(self, **parameters: Any) -> None:
        self.began_s = time.monotonic()
        self.flow_runs = [self.team.submit(targets, **parameters) for targets in EIGHT]

    def store(self, worker: str) -> Path:
        return self.team.folder / worker / ".jetway/store"

    def states_now(self) -> list[str]:
        return [self.team.prefect.state(flow_run) for flow_run in self.flow_runs]

    def assert_all_finish(self) -> None:
        self.states = self.team.prefect.wait(self.flow_runs, RUNS_TIMEOUT_S)
        assert self.states == ["COMPLETED"] * 8, self.team.tails()

    def assert_at_once(self) -> None:
        began_s, ended_s = zip(*map(self.team.prefect.running_s, self.flow_runs), strict=True)
        print(f"eight runs at once for {min(ended_s) - max(began_s):.1f} s")
        assert max(began_s) < min(ended_s)

    def assert_nothing_lost(self) -> None:
        runs = [run_of(self.tracker, flow_run) for flow_run in self.flow_runs]
        children = [child for run in runs for child in self.tracker.children(run)]
        measured = [child for child in children if "latency_ms_p50" in child.metrics]
        assert len(measured) == SESSIONS, f"{SESSIONS - len(measured)} of {SESSIONS} measurements are lost"
        for run, targets in zip(runs, EIGHT, strict=True):
            assert_recorded_once(self.tracker, run)
            rows = self.tracker.load_json(run, RESULT_PATH)["rows"]
            assert sorted(row["target"] for row in rows) == targets
            used = self.tracker.load_json(run, "stages.json")["stages"]
            assert {stage["reused"] for stage in used} == {True}

    def assert_stages_are_shared(self) -> None:
        assert len(self.tracker.search("", experiment="jetway-stages")) == self.stages, "a stage ran again"
        first, second = (
            {path.name for path in self.store(f"worker-{n}").glob("??/*.safetensors")} for n in (1, 2)
        )
        assert first & second, "worker 2 took no part, or made its own"

    def assert_in_turns(self) -> None:
        held = self.held()
        assert len(held) >= SESSIONS
        assert_no_overlap(held)

    def held(self) -> list[tuple[float, float, str]]:
        return holds(Path(lease.lease_path("cpu", lease.directory()) + ".log"), self.began_s)


def test_eight_runs_at_once_on_three_boards(team: Team) -> None:
    nightly = team.prefect.ask("/deployments/name/nightly/nightly")
    assert nightly["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
    eight = Eight(team)
    with accelerator_held():
        eight.start()
        wait_until(lambda: eight.states_now() == ["RUNNING"] * 8, team)
    eight.assert_all_finish()
    eight.assert_at_once()
    eight.assert_nothing_lost()
    eight.assert_stages_are_shared()
    eight.assert_in_turns()


@pytest.mark.slow
def test_without_the_lease_benchmarks_of_the_eight_overlap(team: Team, tmp_path: Path) -> None:
    locked = "            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n            if os.path.exists"
    code = copy_without(tmp_path, "tasks/on_device/lease.py", locked, "            if os.path.exists")
    eight = Eight(team, PYTHONPATH=str(code))
    eight.start()
    eight.assert_all_finish()
    with pytest.raises(AssertionError, match=r"began .* s before .* had ended") as red:
        eight.assert_in_turns()
    print(red.value)


@pytest.mark.slow
def test_without_the_queue_some_of_the_eight_fail(team: Team) -> None:
    eight = Eight(team)
    eight.start(busy_timeout_s=0)
    with pytest.raises(AssertionError):
        eight.assert_all_finish()
    print(eight.states)
    failed = [one for one, state in zip(eight.flow_runs, eight.states, strict=True) if state == "FAILED"]
    messages = [team.prefect.ask(f"/flow_runs/{one}")["state"]["message"] for one in failed]
    assert messages
    assert [told for told in messages if "busy_timeout_s" not in told] == []
    assert_no_overlap(eight.held())


@pytest.mark.slow
@pytest.mark.parametrize("without", ["nothing", "replay"])
def test_an_outage_of_mlflow_loses_what_the_eight_measure_without_the_replay(
    without: str, team: Team, tmp_path: Path
) -> None:
    """The server is away from when all runs want a target, until each of them has spooled what it measured."""
    sends, drops = "self._spool.replay(self._send)", "self._spool.replay(lambda line: True)"
    code = copy_without(tmp_path, "tasks/tracking/tracker.py", sends, drops if without == "replay" else sends)
    eight = Eight(team, PYTHONPATH=str(code))
    with accelerator_held():
        eight.start()
        wait_until(lambda: builds(team, eight.flow_runs) == SESSIONS, team)
        end_group(team.mlflow_process)
    wait_until(lambda: len(list(tmp_path.glob("worker-?/.jetway/spool/*/writes.jsonl"))) == 8, team)
    team.start_mlflow()
    if without == "nothing":
        eight.assert_all_finish()
        eight.assert_nothing_lost()
        eight.assert_stages_are_shared()
    else:
        team.prefect.wait(eight.flow_runs, RUNS_TIMEOUT_S)
        with pytest.raises(AssertionError, match="measurements are lost") as red:
            eight.assert_nothing_lost()
        print(red.value)
    eight.assert_in_turns()


def builds(team: Team, flow_runs: list[str]) -> int:
    """How many builds wait for a target."""
    query = {
        "flow_runs": {"id": {"any_": flow_runs}},
        "task_runs": {"name": {"like_": "build"}, "state": {"type": {"any_": ["RUNNING"]}}},
    }
    return len(team.prefect.ask("/task_runs/filter", query))


def wait_until(true: Callable[[], bool], team: Team) -> None:
    deadline = time.monotonic() + RUNS_TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, team.tails()
        time.sleep(0.5)


@pytest.mark.slow
def test_a_killed_workers_flow_run_is_crashed_by_the_automation_and_its_lease_is_free(team: Team) -> None:
    tracker = Tracker(team.mlflow)
    team.start_worker("worker-1")
    long = ["benchmark.min_duration_s=100"]
    killed = team.submit(["board-1"], overrides=long)
    run_id = run_of(tracker, killed)
    wait_for_benchmark()
    kill_processes(team.folder / "worker-1")
    killed_s = time.monotonic()
    # As a worker on another machine would have left it: nobody here can look its process up.
    tracker.set_tags(run_id, {HOST_TAG: "elsewhere"})
    with accelerator_held():
        freed_s = time.monotonic() - killed_s
    assert team.prefect.state(killed) == "RUNNING"
    assert team.prefect.wait([killed], timeout_s=120) == ["CRASHED"]
    crashed_s = time.monotonic() - killed_s
    print(f"lease free {freed_s:.1f} s after the kill, flow run crashed after {crashed_s:.1f} s")

    team.start_worker("worker-2")
    assert team.prefect.wait([team.submit(["board-1"])]) == ["COMPLETED"], team.tails()
    assert tracker.run(run_id).status == "KILLED"
