"""``jetway ui``: the pages of MLflow and Prefect, on this machine alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from jetway.flows.server import start_server
from jetway.tasks.errors import TrackingError
from jetway.tasks.store import jetway_home
from jetway.tasks.tracking.connection import artifact_location, tracking_uri, without_password

MLFLOW_PORT = 5000
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.2


def start_ui() -> None:
    """Serves both pages on 127.0.0.1, prints their addresses, and stays until Ctrl-C.

    MLflow's server ends with it; Prefect's ends itself when no flow uses it. An MLflow or Prefect server of
    the user's own is shown instead of a local one.
    """
    uri = tracking_uri()
    with start_server() as prefect, mlflow_pages(uri) as mlflow_url:
        prefect.wait_ready()
        print(f"MLflow   {mlflow_url}\nPrefect  {prefect.ui_url}\nCtrl-C ends this.", flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


@contextmanager
def mlflow_pages(uri: str) -> Iterator[str]:
    """Address of MLflow's pages, served from here unless ``uri`` is a server already."""
    if uri.startswith("http"):
        yield without_password(uri)
        return
    port = _free_port(MLFLOW_PORT)
    url = f"http://127.0.0.1:{port}"
    log = jetway_home() / "mlflow-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = _mlflow_command(artifact_location(uri), port)
    with log.open("w") as output, _process(command, uri, output.fileno()) as process:
        _wait_for(url, process, log)
        yield url


def _mlflow_command(location: str | None, port: int) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    return [*command, "--default-artifact-root", location] if location else command


@contextmanager
def _process(command: list[str], uri: str, output: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its children in a group of their own, ended with the block.

    ``uri`` may hold a password, so it goes by the environment: every user can read a command line.
    """
    process = subprocess.Popen(
        command,
        # Its background jobs are half a dozen processes that a page of runs has no use for.
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": uri},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(POLL_S)
    raise TrackingError(f"MLflow's server did not start. Look at {log}.")


def _free_port(preferred: int) -> int:
    for port in (preferred, 0):
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise TrackingError("No free port on 127.0.0.1. End a server that listens there and try again.")
