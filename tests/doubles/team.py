"""What a team runs beside its servers, started by the commands of the README, and what its Prefect server says."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import urllib3
from conftest import ROOT, readme_block

START_TIMEOUT_S = 120
RUNS_TIMEOUT_S = 240
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
#: On sqlite the server refuses what it has no time to write.
PATIENT = urllib3.Retry(total=20, status_forcelist=[503], allowed_methods=None, backoff_factor=0.2)


class PrefectApi:
    """A Prefect server, asked without Prefect's client."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: Any = None) -> Any:
        response = urllib3.request(
            "GET" if body is None else "POST", self.url + path, json=body, timeout=60, retries=PATIENT
        )
        assert response.status < 400, response.data
        return response.json()

    def submit(self, **parameters: Any) -> str:
        deployment = self.ask("/deployments/name/deploy/deploy")
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.ask(f"/deployments/{deployment['id']}/create_flow_run", body)["id"])

    def state(self, flow_run: str) -> str:
        return str(self.ask(f"/flow_runs/{flow_run}")["state_type"])

    def wait(self, flow_runs: Sequence[str], timeout_s: float = RUNS_TIMEOUT_S) -> list[str]:
        """The final states of flow runs."""
        deadline = time.monotonic() + timeout_s
        while True:
            states = [self.state(flow_run) for flow_run in flow_runs]
            if all(state in ENDED for state in states):
                return states
            assert time.monotonic() < deadline, states
            time.sleep(0.5)

    def running_s(self, flow_run: str) -> tuple[float, float]:
        """From when to when a flow run was running, by its states."""
        states = self.ask(f"/flow_run_states/?flow_run_id={flow_run}")
        began = {state["type"]: datetime.fromisoformat(state["timestamp"]).timestamp() for state in states}
        return began["RUNNING"], max(began[end] for end in ENDED if end in began)


class Commands:
    """Runs the README's blocks in processes that know what the README says they must."""

    def __init__(
        self, folder: Path, project: Path, environment: Mapping[str, str], addresses: str = ""
    ) -> None:
        self.folder, self.project, self.addresses = folder, project, addresses
        quiet = {"HOME": str(folder), "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        self.environment = os.environ | quiet | environment
        self.environment.pop("JETWAY_HOME", None)
        self.processes: list[subprocess.Popen[bytes]] = []

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

    def start_worker(self, name: str, **variables: str) -> subprocess.Popen[bytes]:
        """Each has a home of its own. It asks for work every second, not every ten."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        often = {"HOME": str(home), "PREFECT_WORKER_QUERY_SECONDS": "1"}
        return self.start("team worker", f"{name}.log", **often, **variables)

    def stop(self) -> None:
        for process in reversed(self.processes):
            end_group(process)

    def tails(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*.log"))


def end_group(process: subprocess.Popen[bytes], sign: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, sign)
    process.wait(30)


def kill_processes(home: Path) -> None:
    """What the worker of this home runs, itself included, but not what runs on a target for it."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = f"HOME={home}".encode() in (path / "environ").read_bytes().split(b"\0")
            if ours and b"prefect" in (path / "cmdline").read_bytes():
                os.kill(int(path.name), signal.SIGKILL)


def make_schedulable(project: Path) -> None:
    """Adds to a project what comes with Jetway to schedule it."""
    (project / "configs").mkdir()
    shutil.copy(ROOT / "prefect.yaml", project)
    shutil.copy(ROOT / "configs/automations.yaml", project / "configs")


def copy_without(folder: Path, path: str, part: str, instead: str) -> Path:
    """A copy of Jetway's code with one part of one file replaced, to stand on PYTHONPATH."""
    for name in ("configs", "data", "flows", "tasks"):
        shutil.copytree(ROOT / name, folder / "jetway" / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / path).read_text()
    assert text.count(part) == 1, f"{path} has changed"
    (folder / "jetway" / path).write_text(text.replace(part, instead))
    return folder
