"""A server, a worker or the command is killed at a random moment of a real run: nothing is lost or doubled.

Five seeded trials run with the other tests. ``make kill-trials`` runs sixty.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import readme_block
from doubles.record import assert_recorded_once
from doubles.servers import MlflowServer, PrefectServer, Server
from doubles.team import Commands, PrefectApi, kill_processes, make_schedulable

from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import RunRecord

pytestmark = [pytest.mark.team, pytest.mark.filterwarnings("default")]

TRIALS = int(os.environ.get("JETWAY_KILL_TRIALS", "5"))
#: The last one is Prefect's worker with the deploy run that it has started; "run" is one without a worker.
VICTIMS = ("mlflow", "prefect", "run", "worker")
#: What Prefect must say of a run whose end MLflow tells.
AGREES = {"FINISHED": "COMPLETED", "FAILED": "FAILED", "KILLED": "CRASHED"}
#: A run takes about so long; a busy machine is slower, and then the end is never hit.
RUN_S = 15.0
#: The same behind a worker, which has to find it first.
WORKER_RUN_S = 30.0
LONGEST_AWAY_S = 5.0
RUN_TIMEOUT_S = 240
#: A run that went well, its gates or the calm of the machine aside.
ENDED_WELL = (0, 5)


class Lab:
    """A project, a team's two servers, and the home of a user and of a worker."""

    def __init__(self, folder: Path, project: Path) -> None:
        self.project = project
        self.mlflow, self.prefect = MlflowServer(folder / "mlflow"), PrefectServer(folder / "prefect")
        self.mlflow.start(wait=False)
        self.prefect.start()
        self.mlflow.wait_ready()
        self.user_home = folder / "user"
        self.home = self.user_home / ".jetway"
        self.tracker, self.api = Tracker(self.mlflow.url), PrefectApi(self.prefect.api_url)
        servers = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "MLFLOW_TRACKING_URI": self.mlflow.url,
            "PREFECT_API_URL": self.prefect.api_url,
        }
        self.commands = Commands(folder, project, servers)
        self.commands.run("team deployments")

    def start(self, seed: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jetway.flows", "run", "my_recipe.yaml", "--set", f"seed={seed}", "--json"],
            env=self.commands.environment | {"JETWAY_HOME": str(self.home)}, cwd=self.project,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        _, stderr = process.communicate(timeout=RUN_TIMEOUT_S)
        return process.returncode, stderr

    @contextmanager
    def worker(self) -> Iterator[None]:
        """Prefect's worker; at the end it is killed with all that it runs."""
        self.commands.start_worker(self.user_home.name)
        try:
            yield
        finally:
            kill_processes(self.user_home)

    def submit(self, seed: int) -> str:
        return self.api.submit(recipe="my_recipe.yaml", overrides=[f"seed={seed}"])

    def finished(self, seed: int) -> int:
        return [run.status for run in self.runs(seed)].count("FINISHED")

    def runs(self, seed: int) -> list[RunRecord]:
        return [run for run in self.tracker.pipeline_runs() if run.params.get("seed") == str(seed)]

    def live_flow_runs(self) -> list[Any]:
        body = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING"]}}}}
        found = self.api.ask("/flow_runs/filter", body)
        return [(run["name"], run["state_type"], run["tags"]) for run in found]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, small_project: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("kill trials"), small_project)
    yield lab
    lab.commands.stop()
    lab.mlflow.kill()
    lab.prefect.kill()


@pytest.fixture(scope="module")
def small_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's project at its smallest."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_package").mkdir()
    (folder / "my_package/__init__.py").touch()
    (folder / "my_package/my_module.py").write_text(readme_block("workload example"))
    recipe = yaml.safe_load(readme_block("recipe example"))
    recipe["workload"]["options"] = {"width": 16}
    recipe |= {"variants": ["baseline-fp32"], "gates": [], "targets": ["quick"]}
    recipe |= {"train": {"epochs": 1, "learning_rate": 3e-3}}
    recipe["benchmark"] = {"min_duration_s": 0.3, "min_queries": 100, "max_extensions": 0}
    (folder / "my_recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "targets").mkdir()
    target = {"name": "quick", "kind": "loopback", "orphan_grace_s": 5, "quarantine_after": 0}
    (folder / "targets/quick.yaml").write_text(yaml.safe_dump(target))
    make_schedulable(folder)
    return folder


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_kill_at_a_random_moment_loses_and_doubles_nothing(trial: int, lab: Lab) -> None:
    # Five trials have every victim; what is random is the moment and how long a server stays away.
    victim, random_ = VICTIMS[trial % len(VICTIMS)], random.Random(trial)
    if victim == "worker":
        kill_worker(lab, 1000 + trial, random_.uniform(0, WORKER_RUN_S))
    else:
        kill(lab, victim, 1000 + trial, random_.uniform(0, RUN_S), random_.uniform(0, LONGEST_AWAY_S))


def kill(lab: Lab, victim: str, seed: int, moment_s: float, away_s: float) -> None:
    """A server or the command itself; a run whose server comes back goes on, and one that died is resumed."""
    told = f"{victim} killed at {moment_s:.1f} s, away for {away_s:.1f} s"
    process = lab.start(seed)
    time.sleep(moment_s)
    if victim == "run":
        process.kill()
    else:
        restart(lab.mlflow if victim == "mlflow" else lab.prefect, away_s)
    code, stderr = lab.finish(process)
    assert code in ENDED_WELL or victim == "run", f"{told}: {stderr}"
    if code not in ENDED_WELL:
        code, stderr = lab.finish(lab.start(seed))
        assert code in ENDED_WELL, f"{told}, not resumed: {stderr}"
    assert_sound(lab, seed, told)


def restart(server: Server, away_s: float) -> None:
    server.kill()
    time.sleep(away_s)
    server.start()


def kill_worker(lab: Lab, seed: int, moment_s: float) -> None:
    """Another worker does what this one had not begun; what it had begun is submitted anew."""
    with lab.worker():
        killed = lab.submit(seed)
        time.sleep(moment_s)
    state, finished, killed_s = lab.api.state(killed), lab.finished(seed), time.monotonic()
    told = f"worker killed at {moment_s:.1f} s, its run {state}"
    with lab.worker():
        flow_runs = [killed, lab.submit(seed)] if state in ("PENDING", "RUNNING") else [killed]
        states = lab.api.wait(flow_runs, RUN_TIMEOUT_S)
    print(f"{told}; all ended {time.monotonic() - killed_s:.0f} s later as {states}")
    assert states[-1] == "COMPLETED", f"{told}, not resumed: {lab.commands.tails()}"
    assert_sound(lab, seed, told, results=finished + (state != "COMPLETED"))


def assert_sound(lab: Lab, seed: int, told: str, results: int = 1) -> None:
    """Of all that was run with this seed: ends that are true in both servers, and each result recorded once."""
    assert lab.finished(seed) == results, told
    for run in lab.runs(seed):
        state = lab.api.state(run.tags["prefect.flow_run_id"])
        assert state == AGREES[run.status], f"{told}: {run.status} in MLflow, {state} in Prefect"
        if run.status == "FINISHED":
            assert_recorded_once(lab.tracker, run.run_id)
    assert lab.tracker.search("attributes.status = 'RUNNING'") == [], told
    assert lab.live_flow_runs() == [], told
    keys = Counter(run.tags["jetway.stage_key"] for run in stage_entries(lab.tracker))
    assert [key for key, count in keys.items() if count > 1] == [], told
    assert list((lab.home / "spool").glob("*")) == [], told


def stage_entries(tracker: Tracker) -> list[Any]:
    return tracker.search("attributes.status = 'FINISHED'", experiment="jetway-stages")
