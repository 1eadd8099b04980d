"""A server or the worker is killed at a random moment of a real run: nothing is lost or doubled, the states are true.

Five seeded trials run with the other tests. ``make kill-trials`` runs sixty.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from doubles.record import assert_recorded_once
from doubles.servers import MlflowServer, PrefectServer

from jetway.tasks.tracking.tracker import Tracker

pytestmark = [pytest.mark.team, pytest.mark.filterwarnings("default")]

TRIALS = int(os.environ.get("JETWAY_KILL_TRIALS", "5"))
VICTIMS = ("mlflow", "prefect", "worker")
#: What Prefect must say of a run whose end MLflow tells.
AGREES = {"FINISHED": "COMPLETED", "FAILED": "FAILED", "KILLED": "CRASHED"}
#: A run takes about so long; a busy machine is slower, and then the end is never hit.
RUN_S = 15.0
LONGEST_AWAY_S = 5.0
RUN_TIMEOUT_S = 240
#: A run that went well, its gates or the calm of the machine aside.
ENDED_WELL = (0, 5)


class Lab:
    """A project, a team's two servers, and a home."""

    def __init__(self, folder: Path, project: Path) -> None:
        self.project = project
        self.mlflow, self.prefect = MlflowServer(folder / "mlflow"), PrefectServer(folder / "prefect")
        self.mlflow.start(wait=False)
        self.prefect.start()
        self.mlflow.wait_ready()
        self.home = folder / "home"
        self.tracker = Tracker(self.mlflow.url)

    def start(self, seed: int) -> subprocess.Popen[str]:
        own = {
            "JETWAY_HOME": str(self.home),
            "MLFLOW_TRACKING_URI": self.mlflow.url,
            "PREFECT_API_URL": self.prefect.api_url,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "jetway.flows", "run", "my_recipe.yaml", "--set", f"seed={seed}", "--json"],
            env=os.environ | own, cwd=self.project, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        _, stderr = process.communicate(timeout=RUN_TIMEOUT_S)
        return process.returncode, stderr

    def state_of(self, flow_run_id: str) -> str:
        url = f"{self.prefect.api_url}/flow_runs/{flow_run_id}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return str(json.load(response)["state_type"])

    def live_flow_runs(self) -> list[Any]:
        body = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING"]}}}}
        request = urllib.request.Request(
            f"{self.prefect.api_url}/flow_runs/filter",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return [(run["name"], run["state_type"], run["tags"]) for run in json.load(response)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, small_project: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("kill trials"), small_project)
    yield lab
    lab.mlflow.kill()
    lab.prefect.kill()


@pytest.fixture(scope="module")
def small_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's project at its smallest."""
    from conftest import readme_block

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
    return folder


def kill(lab: Lab, victim: str, process: subprocess.Popen[str], away_s: float) -> None:
    if victim == "worker":
        process.kill()
        return
    server = lab.mlflow if victim == "mlflow" else lab.prefect
    server.kill()
    time.sleep(away_s)
    server.start()


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_kill_at_a_random_moment_loses_and_doubles_nothing(trial: int, lab: Lab) -> None:
    random_ = random.Random(trial)
    # Five trials have every victim; what is random is the moment and how long a server stays away.
    victim, moment_s = VICTIMS[trial % 3], random_.uniform(0, RUN_S)
    away_s = random_.uniform(0, LONGEST_AWAY_S)
    told = f"{victim} killed at {moment_s:.1f} s, away for {away_s:.1f} s"
    process = lab.start(seed=1000 + trial)
    time.sleep(moment_s)
    kill(lab, victim, process, away_s)
    code, stderr = lab.finish(process)
    assert code in ENDED_WELL or victim == "worker", f"{told}: {stderr}"
    if code not in ENDED_WELL:
        code, stderr = lab.finish(lab.start(seed=1000 + trial))
        assert code in ENDED_WELL, f"{told}, not resumed: {stderr}"
    assert_sound(lab, 1000 + trial, told)


def assert_sound(lab: Lab, seed: int, told: str) -> None:
    """Of all that was run with this seed: ends that are true in both servers, and one result, recorded once."""
    runs = [run for run in lab.tracker.pipeline_runs() if run.params.get("seed") == str(seed)]
    assert [run.status for run in runs].count("FINISHED") == 1, told
    assert_recorded_once(lab.tracker, next(run for run in runs if run.status == "FINISHED").run_id)
    for run in runs:
        state = lab.state_of(run.tags["prefect.flow_run_id"])
        assert state == AGREES[run.status], f"{told}: {run.status} in MLflow, {state} in Prefect"
    assert lab.tracker.search("attributes.status = 'RUNNING'") == [], told
    assert lab.live_flow_runs() == [], told
    keys = Counter(run.tags["jetway.stage_key"] for run in stage_entries(lab.tracker))
    assert [key for key, count in keys.items() if count > 1] == [], told
    assert list((lab.home / "spool").glob("*")) == [], told


def stage_entries(tracker: Tracker) -> list[Any]:
    return tracker.search("attributes.status = 'FINISHED'", experiment="jetway-stages")
