"""A fake Jetson in use: switched on and off, cut from the network, and told to fail."""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import yaml

from doubles.fake_jetson.machines import MACHINES, Installation
from jetway.tasks.on_device import lease

SERVER = Path(__file__).parent / "server.py"
STOP_TIMEOUT_S = 10.0


class FakeJetson:
    """``with FakeJetson(folder, name) as jetson:`` serves in the body; afterwards nothing of it runs."""

    def __init__(self, folder: Path, name: str, compiled: Path | None = None) -> None:
        self.machine = MACHINES[name]
        self.name = name
        self.folder = folder
        self.installation = Installation(folder, self.machine, compiled or folder)
        self.port = 0
        self._variables: dict[str, str] = {}
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> FakeJetson:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all that runs here, and removes the leases of a machine that will not come back."""
        self.power_off()
        for path in Path(lease.directory()).glob(f"{self.installation.serial}-*"):
            path.unlink()

    def start(self) -> None:
        """The server, on the port that it had before."""
        self._server = subprocess.Popen(
            [sys.executable, "-P", str(SERVER), str(self.folder), str(self.port)],
            env=self.installation.environment | self._variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._server.stdout is not None
        self.port = json.loads(self._server.stdout.readline())["port"]

    def drop_connections(self) -> None:
        """The link is gone for a moment. What runs here goes on."""
        self._kill_server()
        self.start()

    def reboot(self) -> None:
        """Everything that runs here is gone at once, and the kernel has another boot id."""
        self.power_off()
        self.installation.new_boot()
        self.start()

    def set(self, **variables: object) -> None:
        """Other variables for whoever logs in from now on, such as TENSORRT_DOUBLE_FAULT."""
        self._variables = {name: str(value) for name, value in variables.items()}
        self.drop_connections()

    def power_off(self) -> None:
        self._kill_server()
        until = time.monotonic() + STOP_TIMEOUT_S
        while running := list(self.processes()):
            assert time.monotonic() < until, f"these do not end: {running}"
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def processes(self) -> Iterator[int]:
        """What runs here: every process with this machine's variables."""
        mark = f"JETWAY_SIMULATED_ROOT={self.installation.root}\0".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes():
                    yield int(path.parts[2])

    def progress(self) -> str:
        """What the jobs that run here have said so far."""
        found = (self.installation.home / "jetway/jobs").glob("*/progress.jsonl")
        return "".join(path.read_text() for path in found)

    def target_values(self) -> dict[str, object]:
        """What a target file says."""
        return {
            "name": self.name,
            "host": "127.0.0.1",
            "port": self.port,
            "user": getpass.getuser(),
            "identity_file": str(self.folder / "ssh/id_ed25519"),
            "known_hosts": str(self.folder / "ssh/known_hosts"),
            "engine": "tensorrt",
        }

    def write_target(self, folder: Path, **changes: object) -> Path:
        """The target file, as ``jetway`` finds it by name from the folder above ``targets``."""
        path = folder / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(self.target_values() | changes))
        return path

    def _kill_server(self) -> None:
        if self._server is None:
            return
        self._server.kill()
        self._server.wait()
        for pipe in (self._server.stdin, self._server.stdout):
            assert pipe is not None
            pipe.close()
        self._server = None
