"""A target in use: open it, push files, run verbs, pull results, close it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jetway.configs.schema import Target
from jetway.tasks.artifacts import Handle
from jetway.tasks.target import loopback
from jetway.tasks.target.agent import ON_DEVICE, build_agent
from jetway.tasks.target.connection import Connection
from jetway.tasks.target.jobs import RECONNECT_LIMIT_S, Job, JobProgress, Json, call_verb, run_job
from jetway.tasks.target.transfer import Transfer, TransferProgress


def ignore(line: Json) -> None:
    pass


@contextmanager
def open_target(target: Target, *, agent_folder: Path = ON_DEVICE) -> Iterator[TargetSession]:
    """Connects to a target and closes it at the end.

    Raises TargetUnreachableError, HostKeyError or another TargetError when it cannot be reached.
    """
    with Connection(as_ssh_host(target)) as connection:
        connection.open()
        yield TargetSession(connection, agent_folder)


def as_ssh_host(target: Target) -> Target:
    """The target with everything a connection needs; paths that start with ``~/`` are the login folder's."""
    host = loopback.resolve(target) if target.kind == "loopback" else target
    return host.model_copy(
        update={"python": _from_login_folder(host.python), "work_dir": _from_login_folder(host.work_dir)}
    )


class TargetSession:
    """What a stage does on a target. Threads may share it."""

    def __init__(self, connection: Connection, agent_folder: Path = ON_DEVICE) -> None:
        self.connection = connection
        self._transfer = Transfer(connection)
        self._agent_folder = agent_folder
        self._agent_path: str | None = None
        self._lock = threading.Lock()

    @property
    def target(self) -> Target:
        return self.connection.target

    def push(self, handle: Handle, path: Path, progress: TransferProgress | None = None) -> str:
        """Puts the handle's file on the target, unless it is there, and returns its absolute path there."""
        return self._transfer.push(path, handle.sha256, handle.size_bytes, progress)

    def pull(
        self, remote_path: str, local_path: Path, sha256: str, progress: TransferProgress | None = None
    ) -> None:
        """Fetches a file and checks its digest; ``local_path`` appears whole or not at all."""
        self._transfer.pull(remote_path, local_path, sha256, progress)

    def call(self, verb: str, request: Json, timeout_s: float = 60) -> Json:
        """Runs a quick verb, such as ``probe``, and returns its result."""
        return call_verb(self.connection, self._agent(), verb, request, timeout_s)

    def run_job(
        self,
        verb: str,
        request: Json,
        timeout_s: float,
        on_progress: JobProgress = ignore,
        *,
        lease: bool = True,
        reconnect_limit_s: float = RECONNECT_LIMIT_S,
    ) -> Json:
        """Runs a long verb as a job that outlives a dropped connection, and returns its result.

        With ``lease`` it has the target's accelerator to itself and waits for it up to busy_timeout_s;
        ``timeout_s`` counts from then on. Raises TargetBusyError, TargetTimeoutError, TargetMismatchError,
        BuildError or RemoteCommandError by what went wrong there, ArtifactError when a pushed file has gone
        bad, and TargetUnreachableError when the target is away for longer than ``reconnect_limit_s``.
        """
        job = Job(verb, request, timeout_s, lease)
        return run_job(self.connection, self._agent(), job, on_progress, reconnect_limit_s=reconnect_limit_s)

    def _agent(self) -> str:
        with self._lock:
            if self._agent_path is None:
                self._agent_path = self._transfer.push_bytes(build_agent(self._agent_folder))
            return self._agent_path


def _from_login_folder(path: str) -> str:
    """Commands start in the login folder, and a quoted ~ means nothing to a shell."""
    return "./" + path[2:] if path.startswith("~/") else path
