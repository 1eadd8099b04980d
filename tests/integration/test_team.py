"""A team's servers and workers, set up by the commands of the README, and eight deploy runs at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, readme_block
from doubles.record import assert_no_overlap, assert_recorded_once, holds
from doubles.servers import free_port

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
START_TIMEOUT_S = 120
RUNS_TIMEOUT_S = 240


class Postgres:
    """A private cluster in a folder of its own; it refuses to run as root."""

    def __init__(self, folder: Path) -> None:
        self.bin = next(Path("/usr/lib/postgresql").glob("*/bin"), None)
        if self.bin is None:
            pytest.skip("needs PostgreSQL (apt-get install postgresql)")
        self.folder = folder
        self.port = free_port()
        self.user = "postgres" if os.geteuid() == 0 else None
        if self.user:
            shutil.chown(folder, self.user)

    def start(self) -> None:
        data = self.folder / "data"
        (self.folder / "password").write_text("administrator")
        (self.folder / "password").chmod(0o644)
        self.run("initdb", "--pgdata", data, "--username", "postgres", "--auth-host", "scram-sha-256",
                 "--auth-local", "trust", "--pwfile", self.folder / "password", "--no-sync")  # fmt: skip
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self.run("pg_ctl", "start", "--wait", "--pgdata", data, "--log", self.folder / "log", "-o", options)

    def stop(self) -> None:
        self.run("pg_ctl", "stop", "--mode", "immediate", "--pgdata", self.folder / "data")

    def run(self, command: str, *arguments: object) -> None:
        assert self.bin is not None
        subprocess.run(
            [str(self.bin / command), *map(str, arguments)],
            user=self.user, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip


class Team:
    """Runs the README's blocks in processes that know what the README says they must."""

    def __init__(self, folder: Path, project: Path, postgres: Postgres) -> None:
        self.folder, self.project = folder, project
        self.processes: list[subprocess.Popen[bytes]] = []
        ports = {"MLFLOW_PORT": str(free_port()), "PREFECT_PORT": str(free_port())}
        self.environment = {
            **os.environ, "HOME": str(folder), "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PATH": f"{Path(sys.executable).parent}:{postgres.bin}:{os.environ['PATH']}",
            "PGHOST": str(postgres.folder), "PGPORT": str(postgres.port), "PGUSER": "postgres",
            "DATABASE_PASSWORD": PASSWORD, "ARTIFACTS": str(folder / "artifacts"),
            "DATABASE": f"jetway:it%27s%20%24ecret@127.0.0.1:{postgres.port}", "TEAM_HOST": "127.0.0.1", **ports,
        }  # fmt: skip
        self.environment.pop("JETWAY_HOME", None)
        ours = {
            "10.0.0.5": "127.0.0.1",
            "=5000": f"={ports['MLFLOW_PORT']}",
            "=4200": f"={ports['PREFECT_PORT']}",
        }
        self.addresses = readme_block("team addresses")
        for theirs, our in ours.items():
            assert theirs in self.addresses
            self.addresses = self.addresses.replace(theirs, our)
        self.mlflow = f"http://127.0.0.1:{ports['MLFLOW_PORT']}"
        self.prefect = f"http://127.0.0.1:{ports['PREFECT_PORT']}/api"

    def run(self, block: str) -> None:
        done = subprocess.run(
            ["bash", "-euc", self.addresses + readme_block(block)],
            env=self.environment, cwd=self.project, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=START_TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, block: str, log: str, **variables: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                ["bash", "-euc", self.addresses + readme_block(block)],
                env=self.environment | variables, cwd=self.project, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def start_worker(self, name: str) -> subprocess.Popen[bytes]:
        """Each has a home of its own. It asks for work every second, not every ten."""
        (self.folder / name).mkdir(exist_ok=True)
        return self.start(
            "team worker", f"{name}.log", HOME=str(self.folder / name), PREFECT_WORKER_QUERY_SECONDS="1"
        )

    def stop(self) -> None:
        for process in reversed(self.processes):
            end_group(process)

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.prefect + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def submit(self, **parameters: Any) -> str:
        deployment = self.ask("/deployments/name/deploy/deploy")
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.ask(f"/deployments/{deployment['id']}/create_flow_run", body)["id"])

    def wait(self, flow_runs: list[str], timeout_s: float = RUNS_TIMEOUT_S) -> list[str]:
        """The final states of flow runs."""
        deadline = time.monotonic() + timeout_s
        while True:
            states = [self.ask(f"/flow_runs/{flow_run}")["state_type"] for flow_run in flow_runs]
            if all(state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") for state in states):
                return states
            assert time.monotonic() < deadline, (states, self.tails())
            time.sleep(0.5)

    def tails(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*.log"))


def end_group(process: subprocess.Popen[bytes], sign: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, sign)
    process.wait(30)


def wait_ready(url: str, process: subprocess.Popen[bytes], team: Team) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        assert process.poll() is None, team.tails()
        assert time.monotonic() < deadline, team.tails()
        time.sleep(0.2)


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
        # On two cores shared by four runs a session is seldom VALID, and none may be left out for that.
        target = {"name": board, "kind": "loopback", "orphan_grace_s": 5, "quarantine_after": 0}
        (project / f"targets/{board}.yaml").write_text(yaml.safe_dump(target))
    (project / "configs").mkdir()
    shutil.copy(ROOT / "prefect.yaml", project)
    shutil.copy(ROOT / "configs/automations.yaml", project / "configs")
    return project


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="jetway-postgres-") as folder:
        postgres = Postgres(Path(folder))
        postgres.start()
        try:
            yield postgres
        finally:
            postgres.stop()


@pytest.fixture
def team(tmp_path: Path, team_project: Path) -> Iterator[Team]:
    """The servers run and know the deployments; no worker yet."""
    with running_postgres() as postgres:
        team = Team(tmp_path, team_project, postgres)
        try:
            team.run("team databases")
            mlflow = team.start("team mlflow server", "mlflow.log")
            prefect = team.start("team prefect server", "prefect.log")
            wait_ready(f"{team.prefect}/health", prefect, team)
            team.run("team deployments")
            wait_ready(f"{team.mlflow}/health", mlflow, team)
            yield team
        finally:
            team.stop()


def kill_processes(home: Path) -> None:
    """What the worker of this home runs, itself included, but not what runs on a target for it."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = f"HOME={home}".encode() in (path / "environ").read_bytes().split(b"\0")
            if ours and b"prefect" in (path / "cmdline").read_bytes():
                os.kill(int(path.name), signal.SIGKILL)


def run_of(tracker: Tracker, flow_run: str, timeout_s: float = 60) -> str:
    """Id of the run that a flow run has made in MLflow."""
    deadline = time.monotonic() + timeout_s
    while not (found := tracker.search(f"tags.`prefect.flow_run_id` = '{flow_run}'")):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found[0].run_id


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


@pytest.mark.slow
def test_a_killed_workers_flow_run_is_crashed_by_the_automation_and_its_lease_is_free(team: Team) -> None:
    tracker = Tracker(team.mlflow)
    team.start_worker("worker-1")
    long = ["benchmark.min_duration_s=100"]
    killed = team.submit(recipe="my_recipe.yaml", targets=["board-1"], overrides=long)
    run_id = run_of(tracker, killed)
    wait_for_benchmark()
    kill_processes(team.folder / "worker-1")
    killed_s = time.monotonic()
    # As a worker on another machine would have left it: nobody here can look its process up.
    tracker.set_tags(run_id, {HOST_TAG: "elsewhere"})
    with lease.held("cpu", job="test", timeout_s=30, wait=lambda seconds, holder: time.sleep(seconds)):
        freed_s = time.monotonic() - killed_s
    assert team.ask(f"/flow_runs/{killed}")["state_type"] == "RUNNING"
    assert team.wait([killed], timeout_s=120) == ["CRASHED"]
    crashed_s = time.monotonic() - killed_s
    print(f"lease free {freed_s:.1f} s after the kill, flow run crashed after {crashed_s:.1f} s")

    team.start_worker("worker-2")
    assert team.wait([team.submit(recipe="my_recipe.yaml", targets=["board-1"])]) == ["COMPLETED"], (
        team.tails()
    )
    assert tracker.run(run_id).status == "KILLED"


def test_eight_runs_at_once_on_three_boards(team: Team) -> None:
    tracker = Tracker(team.mlflow)
    assert team.ask("/deployments/name/nightly/nightly")["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
    team.start_worker("worker-1")
    assert team.wait([team.submit(recipe="my_recipe.yaml", targets=["board-1"])]) == ["COMPLETED"], (
        team.tails()
    )
    stages = len(tracker.search("", experiment="jetway-stages"))
    first, second = (team.folder / name / ".jetway" / "store" for name in ("worker-1", "worker-2"))
    assert not second.exists()

    team.start_worker("worker-2")
    began_s = time.monotonic()
    flow_runs = [team.submit(recipe="my_recipe.yaml", targets=targets) for targets in EIGHT]
    assert team.wait(flow_runs) == ["COMPLETED"] * 8, team.tails()

    for flow_run, targets in zip(flow_runs, EIGHT, strict=True):
        (run,) = tracker.search(f"tags.`prefect.flow_run_id` = '{flow_run}'")
        assert_recorded_once(tracker, run.run_id)
        rows = tracker.load_json(run.run_id, RESULT_PATH)["rows"]
        assert sorted(row["target"] for row in rows) == targets
        used = tracker.load_json(run.run_id, "stages.json")["stages"]
        assert {stage["reused"] for stage in used} == {True}
    assert len(tracker.search("", experiment="jetway-stages")) == stages, "a stage ran again"
    files = {path.name for path in first.glob("??/*")}
    brought = {path.name for path in second.glob("??/*")} & files
    assert any(name.endswith(".safetensors") for name in brought), "worker 2 took no part, or made its own"

    held = holds(Path(lease.lease_path("cpu", lease.directory()) + ".log"), began_s)
    assert len(held) >= sum(len(targets) for targets in EIGHT)
    assert_no_overlap(held)
