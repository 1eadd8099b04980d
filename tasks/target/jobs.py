"""Jobs on a target, from the host's side: start, follow, re-attach, end.

The other side is ``tasks/on_device/job.py``. One long command streams the job's progress and carries our
heartbeats; when the link drops, the next command attaches to the job where the last one stopped.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jetway.tasks.errors import (
    ArtifactError,
    BuildError,
    JetwayError,
    RemoteCommandError,
    TargetBusyError,
    TargetMismatchError,
    TargetTimeoutError,
    TargetUnreachableError,
)
from jetway.tasks.target.connection import Connection
from jetway.tasks.target.process import RECORD_SEPARATOR, RemoteProcess, parse_record, readable
from jetway.tasks.target.transfer import python_error

SCHEMA_VERSION = 1
HEARTBEAT_S = 1.0
#: How long a target may be away, a reboot included, before its job is given up.
RECONNECT_LIMIT_S = 180.0
RECONNECT_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0)
END_TIMEOUT_S = 10.0
#: What follow understands: any byte is a sign of life, and this one ends the job.
HEARTBEAT, END = b".", b"e"

Json = dict[str, Any]
JobProgress = Callable[[Json], None]

_interrupted = threading.Event()
_process = uuid.uuid4().hex[:4]


def owner() -> str:
    """Whose jobs these are, as a target's lease names them: jobs of one process wait for each other."""
    return f"{getpass.getuser()}@{socket.gethostname()}, process {os.getpid()}-{_process}"


def interrupt_jobs() -> None:
    """Ends every job that this process follows or will yet start, in whatever thread.

    For Ctrl-C, which only the main thread sees.
    """
    _interrupted.set()


@dataclass
class Job:
    """What to run, and how far its story has been heard."""

    verb: str
    request: Json
    timeout_s: float
    #: Whether it needs the accelerator to itself.
    lease: bool = True
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    started: bool = False
    offset: int = 0


class JobGone(Exception):
    """The job is not on the target any more: ``orphaned``, ``died`` or ``rebooted``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def call_verb(connection: Connection, agent_path: str, verb: str, request: Json, timeout_s: float) -> Json:
    """Runs a quick verb in one command and returns its result."""
    target = connection.target
    spec = _encode({"verb": verb, "request": request, "work_dir": target.work_dir})
    argv = [target.python, agent_path, "call", verb, str(len(spec))]
    result = connection.run(argv, timeout_s=timeout_s, stdin=spec, check=False)
    records = [line for line in result.stdout.split(b"\n") if RECORD_SEPARATOR in line]
    record = parse_record(records[-1]) if records else None
    if record is None:
        raise python_error(target, target.python, result.exit_status, readable(result.stderr))
    return _result_of(record, verb, target.name)


def run_job(
    connection: Connection,
    agent_path: str,
    job: Job,
    on_progress: JobProgress,
    *,
    reconnect_limit_s: float = RECONNECT_LIMIT_S,
) -> Json:
    """Runs a job to its end and returns its result.

    ``on_progress`` gets the job's lines; it must be quick, for no heartbeat goes out meanwhile. A dropped
    link re-attaches. A job that a reboot ended is started once more. Whatever else raises here, Ctrl-C
    included, ends the job and removes its folder.
    """
    try:
        return _Follower(connection, agent_path, job, on_progress, reconnect_limit_s).run()
    except JobGone as gone:
        if gone.reason != "rebooted":
            raise _gone_error(gone.reason, job, connection) from None
    on_progress({"text": f"{connection.target.name} was rebooted; starting {job.verb} again"})
    again = Job(job.verb, job.request, job.timeout_s, job.lease)
    try:
        return _Follower(connection, agent_path, again, on_progress, reconnect_limit_s).run()
    except JobGone as gone:
        raise _gone_error(gone.reason, job, connection) from None


class _Follower:
    def __init__(
        self,
        connection: Connection,
        agent_path: str,
        job: Job,
        on_progress: JobProgress,
        reconnect_limit_s: float,
    ) -> None:
        self._connection = connection
        self._agent_path = agent_path
        self._job = job
        self._on_progress = on_progress
        self._reconnect_limit_s = reconnect_limit_s
        self._target = connection.target
        self._ended = False

    def run(self) -> Json:
        try:
            return self._follow_until_done()
        except (JobGone, JetwayError):
            raise
        except BaseException:
            if not self._ended:
                self._end_from_afar()
            raise

    def _follow_until_done(self) -> Json:
        self._heard = time.monotonic()
        attempt = 0
        while True:
            began = time.monotonic()
            try:
                with self._attach() as process:
                    return self._listen(process)
            except TargetUnreachableError:
                attempt = 0 if self._heard > began else attempt + 1
                if time.monotonic() - self._heard > self._reconnect_limit_s:
                    raise
            self._check_interrupt()
            time.sleep(RECONNECT_PAUSES_S[min(attempt, len(RECONNECT_PAUSES_S) - 1)])

    def _attach(self) -> RemoteProcess:
        spec = _encode(
            {
                "job": self._job.id,
                "verb": self._job.verb,
                "request": self._job.request,
                "work_dir": self._target.work_dir,
                "engine": self._target.leased_engine,
                "lease": self._job.lease,
                "timeout_s": self._job.timeout_s,
                "orphan_grace_s": self._target.orphan_grace_s,
                "busy_timeout_s": self._target.busy_timeout_s,
                "owner": owner(),
                "started": self._job.started,
                "offset": self._job.offset,
            }
        )
        argv = [self._target.python, self._agent_path, "follow", self._job.id, str(len(spec))]
        process = self._connection.start(argv)
        try:
            process.write(spec)
        except TargetUnreachableError:
            process.close()
            raise
        return process

    def _listen(self, process: RemoteProcess) -> Json:
        """Follows the job on one connection. An error of ours or a Ctrl-C ends the job first."""
        try:
            record = self._next_outcome(process)
        except (TargetUnreachableError, JobGone):
            raise
        except BaseException:
            self._finish(process)
            raise
        self._finish(process)
        return _result_of(record, self._job.verb, self._target.name)

    def _next_outcome(self, process: RemoteProcess) -> Json:
        beat = time.monotonic()
        while True:
            self._check_interrupt()
            if time.monotonic() - beat >= HEARTBEAT_S:
                process.write(HEARTBEAT)
                beat = time.monotonic()
            try:
                record = process.read_record(HEARTBEAT_S / 2)
            except TimeoutError:
                continue
            if record is None:
                self._explain_end(process)
            self._heard = time.monotonic()
            self._job.started = True
            if "gone" in record:
                raise JobGone(str(record["gone"]))
            if "result" in record or "error" in record:
                return record
            if "progress" in record:
                self._job.offset = int(record["offset"])
                self._on_progress(record["progress"])

    def _explain_end(self, process: RemoteProcess) -> NoReturn:
        """follow ended before the job did: with the link, which is worth another try, or on its own."""
        status = process.wait()
        if status > 0 and not self._job.started:
            raise python_error(self._target, self._target.python, status, readable(process.stderr))
        raise TargetUnreachableError(
            f"{self._target.name}: the connection was lost while {self._job.verb} ran. Check the network and "
            "the target's power, then run again."
        )

    def _finish(self, process: RemoteProcess) -> None:
        """Ends what is left of the job and waits until its folder is gone."""
        self._ended = True
        try:
            process.write(END)
            until = time.monotonic() + END_TIMEOUT_S
            while time.monotonic() < until and process.read_record(END_TIMEOUT_S) is not None:
                pass
        except (TargetUnreachableError, TimeoutError):
            pass  # the job ends itself after orphan_grace_s

    def _end_from_afar(self) -> None:
        """Ends the job over a connection of its own, when none was at hand."""
        self._job.started = True
        try:
            with self._attach() as process:
                self._finish(process)
        except JetwayError:
            pass  # the job ends itself after orphan_grace_s

    def _check_interrupt(self) -> None:
        if _interrupted.is_set():
            raise KeyboardInterrupt


def _encode(spec: Json) -> bytes:
    return json.dumps({**spec, "schema_version": SCHEMA_VERSION}, allow_nan=False).encode()


def _result_of(record: Json, verb: str, name: str) -> Json:
    if "result" in record:
        result: Json = record["result"]
        return result
    raise _device_error(record["error"], str(record.get("log", "")), verb, name)


def _device_error(error: Json, log: str, verb: str, name: str) -> JetwayError:
    """Our error for a DeviceError, by its kind."""
    message, kind = f"{name}: {error['message']}", error["kind"]
    log = readable(log.encode())
    if kind == "build_failed" or (verb == "build" and kind in ("out_of_memory", "disk_full")):
        cause = error["cause"] if kind == "build_failed" else kind
        return BuildError(message, cause=cause, stderr=log)
    match kind:
        case "mismatch":
            return TargetMismatchError(message)
        case "busy":
            return TargetBusyError(message)
        case "timeout":
            return TargetTimeoutError(message)
        case "corrupt":
            return ArtifactError(message)
        case "failed":
            tail = "\n".join(log.strip().splitlines()[-5:])
            return RemoteCommandError(f"{message} ({verb})" + (f"\n{tail}" if tail else ""), stderr=log)
        case _:
            return RemoteCommandError(message, stderr=log)


def _gone_error(reason: str, job: Job, connection: Connection) -> JetwayError:
    name = connection.target.name
    match reason:
        case "orphaned":
            return TargetUnreachableError(
                f"{name}: the link was down for longer than orphan_grace_s "
                f"({connection.target.orphan_grace_s:g} s), so {job.verb} ended itself. Run again; raise "
                "orphan_grace_s of the target if its link is often away that long."
            )
        case "rebooted":
            return RemoteCommandError(
                f"{name} was rebooted twice while {job.verb} ran. Check its power supply and temperature."
            )
        case _:
            return RemoteCommandError(
                f"{name}: {job.verb} was killed together with its supervisor. Look for who or what ends "
                "processes there (a lack of memory, a logout policy such as KillUserProcesses)."
            )
