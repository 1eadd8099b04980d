"""Real servers of MLflow and Prefect that a test may kill and start again at the same address."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

START_TIMEOUT_S = 180.0


class Server:
    """A server process and its children, at a port that stays its own. ``health`` is the path it answers at."""

    health = "/health"

    def __init__(self, folder: Path, **variables: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.variables = variables
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self, *, wait: bool = True) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                env=os.environ | self.variables,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log_tail()
            with suppress(OSError), urllib.request.urlopen(self.url + self.health, timeout=5):
                return
            time.sleep(0.1)
        raise AssertionError(self.log_tail())

    def log_tail(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")[-2000:]

    def kill(self, sign: int = signal.SIGKILL) -> None:
        """Ends the server and every process it started."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, sign)
        self.process.wait(30)
        self.process = None


class MlflowServer(Server):
    """Keeps the artifacts to itself, as a team's does."""

    def __init__(self, folder: Path, database: str | None = None) -> None:
        super().__init__(
            folder,
            MLFLOW_BACKEND_STORE_URI=database or f"sqlite:///{folder / 'server.db'}",
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        )

    def command(self) -> list[str]:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        return [*command, "--workers", "1", "--artifacts-destination", str(self.folder / "artifacts")]


class PrefectServer(Server):
    """A server of its own, as a team's is, with a database that outlives it."""

    health = "/api/health"

    def __init__(self, folder: Path, **variables: str) -> None:
        quiet = {
            "PREFECT_HOME": str(folder),
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
            "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
        }
        super().__init__(folder, **quiet, **variables)

    @property
    def api_url(self) -> str:
        return f"{self.url}/api"

    def command(self) -> list[str]:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
        return [*command, "--port", str(self.port)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
