"""One local Prefect server under ``JETWAY_HOME``, shared by the flows of this home; it ends itself when idle.

Who lives is told by file locks, which the kernel drops with their process, so that nothing is left to clean
up after a ``kill -9``, a reboot or a reused pid:

- ``server.lock``   held by the server as long as it runs; ``server.json`` then names its pid and port
- ``clients.lock``  shared by every flow that uses the server; the server ends when it has been free for long
- ``start.lock``    held while a flow looks for a server and starts one, and while one is stopped

A server that dies under a flow is started again at the same port by the flow, which Prefect's client, with its
own retries, hardly notices.

``server_process.py`` is what runs. Prefect, seconds to import, is imported here only when a flow is about to
run, so that the server starts up meanwhile.
"""

from __future__ import annotations

import contextvars
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from jetway.tasks.environment import boot_id
from jetway.tasks.errors import TrackingError
from jetway.tasks.store import jetway_home

logger = logging.getLogger("jetway")

IDLE_S = 900.0
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.1
DRAIN_TIMEOUT_S = 10.0
QUEUE_TIMEOUT_S = 10.0
MEETING_TIMEOUT_S = 60.0
# Prefect's client waits 2, 4, 8 … seconds between its tries: two minutes in all.
RETRIES = 6
KEEP_POLL_S = 0.5
# The shortest lease that Prefect grants.
LEASE_S = 60.0

# Two questions for slots at the same time, and Prefect's sqlite refuses one, which then comes again seconds later.
_asking = threading.Lock()

# Servers started by this process, kept so that they can be reaped.
_spawned: list[subprocess.Popen[bytes]] = []


class Server:
    """A Prefect API and, if it is ours, the hold on it that keeps it running. Use it in ``with``."""

    def __init__(
        self,
        api_url: str,
        *,
        folder: Path | None = None,
        hold: IO[str] | None = None,
        spawned: bool = False,
    ) -> None:
        #: Address of the API, as ``PREFECT_API_URL`` wants it.
        self.api_url = api_url
        self._folder = folder
        self._hold = hold
        self._spawned = spawned

    @property
    def ui_url(self) -> str:
        """Address of Prefect's UI."""
        return self.api_url.removesuffix("/").removesuffix("/api")

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when the API answers. Raises TrackingError when it does not in time, or has died."""
        deadline = time.monotonic() + timeout_s
        while not _answers(self.api_url):
            if self._folder is not None and not _locked(self._folder / "server.lock"):
                raise TrackingError(
                    f"The local Prefect server ended while it started. {_log_tail(self._folder)}"
                )
            if time.monotonic() > deadline:
                raise TrackingError(self._silent(timeout_s))
            time.sleep(POLL_S)

    def close(self) -> None:
        """Lets go of the server; it ends when nobody has held it for ``idle_s``."""
        if self._hold is not None:
            with suppress(OSError):
                os.utime(self._hold.name)
            self._hold.close()
            self._hold = None

    def stop_if_spawned(self) -> None:
        """Undoes ``start_server``: lets go, and ends the server if this call started it and no other uses it."""
        self.close()
        if not self._spawned or self._folder is None:
            return
        with (self._folder / "start.lock").open("a") as start:
            fcntl.flock(start, fcntl.LOCK_EX)
            if not _locked(self._folder / "clients.lock", exclusive=True):
                _stop(self._folder)

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """A server of ours that dies meanwhile is started again where it was; one that was stopped is not."""
        if self._folder is None:
            yield
            return
        done = threading.Event()
        context = contextvars.copy_context()  # where its warnings go
        keeper = threading.Thread(target=context.run, args=(_keep, self._folder, done), daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _silent(self, timeout_s: float) -> str:
        if self._folder is not None:
            return (
                f"The local Prefect server did not answer within {timeout_s:.0f} s. {_log_tail(self._folder)}"
            )
        return (
            f"No Prefect server answers at {self.api_url} within {timeout_s:.0f} s. Start it, or unset "
            "PREFECT_API_URL to let Jetway start its own."
        )


def start_server(*, idle_s: float = IDLE_S, home: Path | None = None) -> Server:
    """The server of this home, started in the background if none runs. Does not wait for it to be ready.

    ``PREFECT_API_URL`` in the environment wins: then that server is used and none is started. Call it before
    Prefect is first imported, because it also points Prefect's own files and telemetry away from the user.
    """
    folder = _prepare(home)
    if url := os.environ.get("PREFECT_API_URL"):
        return Server(url)
    hold = (folder / "clients.lock").open("a")
    fcntl.flock(hold, fcntl.LOCK_SH)
    os.utime(hold.name)
    with (folder / "start.lock").open("a") as start:
        fcntl.flock(start, fcntl.LOCK_EX)
        spawned = not _locked(folder / "server.lock")
        if spawned:
            _spawn(folder, idle_s)
    port = _read_state(folder)["port"]
    return Server(f"http://127.0.0.1:{port}/api", folder=folder, hold=hold, spawned=spawned)


def stop_server(*, home: Path | None = None) -> bool:
    """Ends the server of this home, and waits until it is gone. Returns whether there was one."""
    folder = _folder(home)
    if not (folder / "server.lock").exists():
        return False
    with (folder / "start.lock").open("a") as start:
        fcntl.flock(start, fcntl.LOCK_EX)
        return _stop(folder)


def _stop(folder: Path) -> bool:
    if not _locked(folder / "server.lock"):
        return False
    pid = int(_read_state(folder)["pid"])
    for sign in (signal.SIGTERM, signal.SIGKILL):
        # It may end by itself between the look at its lock and here.
        with suppress(ProcessLookupError):
            os.kill(pid, sign)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            if not _locked(folder / "server.lock"):
                (folder / "server.json").unlink(missing_ok=True)
                return True
            time.sleep(POLL_S)
    raise TrackingError(f"The Prefect server (pid {pid}) does not end. Look at {folder / 'server.log'}.")


def running_server(*, home: Path | None = None) -> Server | None:
    """The server of this home if one runs, without holding it."""
    folder = _folder(home)
    if not (folder / "server.lock").exists() or not _locked(folder / "server.lock"):
        return None
    return Server(f"http://127.0.0.1:{_read_state(folder)['port']}/api", folder=folder)


@contextmanager
def prefect_settings(server: Server) -> Iterator[None]:
    """Settings for flow calls inside: this API, a quiet console, and our log lines kept in the Prefect run.

    Warnings and errors still reach the console. What is still to be sent is sent at the end of the block,
    where Prefect would otherwise say that it is busy while the process exits.
    """
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_HOME,
        PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW,
        temporary_settings,
    )

    settings: dict[Any, Any] = {
        PREFECT_API_URL: server.api_url,
        PREFECT_HOME: os.environ.get("PREFECT_HOME", str(_folder(None))),
        PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore",
        PREFECT_CLIENT_MAX_RETRIES: RETRIES,
        # The heartbeat's thread is joined at the end of every flow, which costs a second.
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
    }
    level, to_run = logger.level, APILogHandler()
    with temporary_settings(settings), _quiet_console(), server.kept_alive():
        try:
            logger.setLevel(logging.INFO)
            logger.addHandler(to_run)
            yield
        finally:
            logger.removeHandler(to_run)
            logger.setLevel(level)
            _send_the_rest()


def meet_server(timeout_s: float = MEETING_TIMEOUT_S) -> None:
    """Has Prefect look up its server's version, which it does once in a process and, unlike all else, without retries.

    Raises TrackingError when the server stays away.
    """
    from httpx import HTTPError
    from prefect.client.orchestration import get_client

    deadline_s = time.monotonic() + timeout_s
    with get_client(sync_client=True) as client:
        while True:
            try:
                client.raise_for_api_version_mismatch_once()
                return
            except RuntimeError as exc:
                if not isinstance(exc.__cause__, HTTPError) or time.monotonic() > deadline_s:
                    raise TrackingError(f"Prefect's server: {exc}") from exc
                time.sleep(0.2)


@contextmanager
def queue_for(target: str, *, timeout_s: float = QUEUE_TIMEOUT_S) -> Iterator[None]:
    """Waits for this target's turn among the flows of one Prefect server, for ``timeout_s`` at most.

    A courtesy that the Prefect UI shows. A flow killed with -9 keeps its slot for a minute, and flows of
    other servers are not seen, so the lease on the target decides, and nothing here stops a run.
    """
    from httpx import HTTPError
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError as SlotError
    from prefect.concurrency.sync import concurrency

    limit, slot = f"jetway-{target}", ExitStack()
    asked = partial(concurrency, limit, lease_duration=LEASE_S, strict=False)
    try:
        with _asking:
            limit_to_one(limit)
            with suppress(SlotError):
                slot.enter_context(asked(max_retries=0, timeout_seconds=QUEUE_TIMEOUT_S))
                timeout_s = 0.0
        if timeout_s:
            slot.enter_context(asked(timeout_seconds=timeout_s))
    except TimeoutError:
        logger.info("%s: the slot stays taken; its own lease decides", target)
    except (HTTPError, SlotError) as exc:
        logger.warning("%s: no queue, as Prefect is away (%s); its own lease decides", target, exc)
    try:
        yield
    finally:
        with suppress(HTTPError):  # a slot that cannot be given back frees itself
            slot.close()


def limit_to_one(name: str) -> None:
    """Makes a concurrency limit of one slot, unless it is there; another process may make it at the same time."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.upsert_global_concurrency_limit_by_name(name, 1)


@contextmanager
def _quiet_console() -> Iterator[None]:
    """What Prefect would print is in its run; errors reach the caller, who prints them once."""
    names = ("", "prefect._internal")
    handlers = [
        h for n in names for h in logging.getLogger(n).handlers if type(h).__module__.startswith("prefect.")
    ]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


def _send_the_rest() -> None:
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        logging.getLogger(worker.__name__).setLevel(logging.ERROR)
        worker.drain_all(timeout=DRAIN_TIMEOUT_S)


def _folder(home: Path | None) -> Path:
    return (home or jetway_home()) / "prefect"


def _prepare(home: Path | None) -> Path:
    """Makes the folder, and keeps Prefect's own files inside it and its telemetry off."""
    folder = _folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {"PREFECT_HOME": str(folder), "DO_NOT_TRACK": "1", "PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    return folder


def _keep(folder: Path, done: threading.Event) -> None:
    while not done.wait(KEEP_POLL_S):
        if _locked(folder / "server.lock"):
            continue
        with (folder / "start.lock").open("a") as start:
            fcntl.flock(start, fcntl.LOCK_EX)
            if (folder / "server.json").exists() and not _locked(folder / "server.lock"):
                logger.warning("the Prefect server died; it is started again")
                state = _read_state(folder)
                with suppress(OSError):  # the port may still be taken; the next round tries again
                    _spawn(folder, state["idle_s"], state["port"])


def _spawn(folder: Path, idle_s: float, port: int = 0) -> None:
    """Starts the server detached, with its lock and its listening socket already in hand."""
    with (
        (folder / "server.lock").open("a") as lock,
        socket.create_server(("127.0.0.1", port), backlog=128) as listener,
        (folder / "server.log").open("w") as log,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        port = listener.getsockname()[1]
        arguments = (folder, idle_s, lock.fileno(), listener.fileno())
        process = subprocess.Popen(
            [sys.executable, "-m", "jetway.flows.server_process", *map(str, arguments)],
            env=os.environ | _server_environment(folder, port),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock.fileno(), listener.fileno()),
        )
        _spawned.append(process)
        state = {"pid": process.pid, "port": port, "idle_s": idle_s, "boot_id": boot_id()}
        (folder / "server.json.part").write_text(json.dumps(state))
        os.replace(folder / "server.json.part", folder / "server.json")


def _server_environment(folder: Path, port: int) -> dict[str, str]:
    return {
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # Flows that log at the same time wait for sqlite's one writer.
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
    }


def _locked(path: Path, *, exclusive: bool = False) -> bool:
    """Whether some process holds the lock of a file; ``exclusive`` counts shared locks too."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            for process in _spawned:
                process.poll()
            return True
    return False


def _read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "server.json").read_text())
    return state


def _answers(api_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api_url.rstrip('/')}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _log_tail(folder: Path) -> str:
    path = folder / "server.log"
    lines = path.read_text(errors="replace").splitlines()[-5:] if path.exists() else []
    return f"Look at {path}. Its end: {' | '.join(lines) or 'nothing was written'}"
