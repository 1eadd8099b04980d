"""The local Prefect server's own process: Prefect's API and UI, and the watch that ends it.

Its lock and its listening socket come from the flow that starts it, so that neither can be lost in between.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO

import uvicorn
from prefect.server.api.server import create_app
from starlette.types import ASGIApp, Message, Receive, Scope, Send

WATCH_S = 2.0
STOP_TIMEOUT_S = 10.0
SLOTS = "/v2/concurrency_limits/"
SLOT_RETRY_S = 0.2


def serve(folder: Path, idle_s: float, lock_fd: int, socket_fd: int) -> None:
    """Serves until a signal, until ``idle_s`` after the last client, or until its folder is gone."""
    os.set_inheritable(lock_fd, False)
    os.set_inheritable(socket_fd, False)
    app = RetriedSoon(create_app(final=True))
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    threading.Thread(target=_watch, args=(server, folder, idle_s), daemon=True).start()
    server.run(sockets=[socket.socket(fileno=socket_fd)])


class RetriedSoon:
    """Has those asked again at once whom sqlite refused a slot; Prefect's client would wait two seconds and more.

    Sqlite refuses a transaction that has read, and now wants to write, when another has written in between. A
    target's slot is asked for just as the other targets' stages begin, each of which writes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_delay(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 503:
                message["headers"] = [*message["headers"], (b"retry-after", b"%.1f" % SLOT_RETRY_S)]
            await send(message)

        asks = SLOTS in scope.get("path", "")
        await self._app(scope, receive, send_with_delay if asks else send)


def _watch(server: uvicorn.Server, folder: Path, idle_s: float) -> None:
    hold = _wait_until_unused(folder, idle_s)
    server.should_exit = True
    time.sleep(STOP_TIMEOUT_S)
    del hold
    os._exit(0)


def _wait_until_unused(folder: Path, idle_s: float) -> IO[str] | None:
    """Returns the clients' lock, taken: a flow that comes now waits for our end and starts a new server."""
    busy_at, touched = time.monotonic(), 0.0
    while (folder / "server.json").exists():
        clients = (folder / "clients.lock").open("a")
        last_touch = os.fstat(clients.fileno()).st_mtime
        if last_touch != touched or not _try_lock(clients):
            busy_at, touched = time.monotonic(), last_touch
        elif time.monotonic() - busy_at > idle_s:
            return clients
        clients.close()
        time.sleep(min(WATCH_S, idle_s / 4))
    return None


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    serve(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
