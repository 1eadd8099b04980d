"""The loopback target: this machine, reached through a real SSH server like any other."""

from __future__ import annotations

import atexit
import getpass
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from jetway.configs.schema import Target
from jetway.tasks.errors import TargetUnreachableError
from jetway.tasks.store import jetway_home

STOP_TIMEOUT_S = 5.0


def resolve(target: Target) -> Target:
    """The target as an ordinary SSH host: its server runs, and these are its address and keys.

    One server serves the whole process, and ends with it.
    """
    server = _server_of_this_process()
    return target.model_copy(
        update={
            "kind": "ssh",
            "host": "127.0.0.1",
            "port": server.port,
            "user": server.user,
            "identity_file": str(server.keys / "id_ed25519"),
            "known_hosts": str(server.keys / "known_hosts"),
        }
    )


class LoopbackServer:
    """A server process; it sees our end through its stdin, even when we are killed."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.user = _user_name()
        # -P: a folder of the user's that is named jetway is not the package.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jetway.tasks.target.loopback_server", str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            # Ctrl-C in the terminal is ours: the server is needed to end what runs.
            start_new_session=True,
        )
        hello = self._hello()
        self.port = int(hello["port"])
        self.keys = Path(hello["keys"])

    def is_running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            _pipe(pipe).close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _hello(self) -> dict[str, str]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            self.stop()
            raise TargetUnreachableError(
                "loopback: its SSH server did not start. Try it by hand to see why: "
                f"{sys.executable} -m jetway.tasks.target.loopback_server ."
            )
        hello: dict[str, str] = json.loads(line)
        return hello


_lock = threading.Lock()
_servers: dict[int, LoopbackServer] = {}


def _server_of_this_process() -> LoopbackServer:
    home = jetway_home() / "targets" / "loopback"
    with _lock:
        server = _servers.get(os.getpid())
        if server is not None and (server.home != home or not server.is_running()):
            server.stop()
            server = None
        if server is None:
            server = LoopbackServer(home)
            atexit.register(server.stop)
            _servers.clear()
            _servers[os.getpid()] = server
        return server


def _environment() -> dict[str, str]:
    """Ours, with our own Python as the target's ``python3``: the one with an engine."""
    folder = str(Path(sys.executable).parent)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def _user_name() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = ""
    return name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9._-]*", name) else "jetway"


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "the process was started with pipes"
    return pipe
