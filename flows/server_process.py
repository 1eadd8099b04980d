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

WATCH_S = 2.0
STOP_TIMEOUT_S = 10.0


def serve(folder: Path, idle_s: float, lock_fd: int, socket_fd: int) -> None:
    """Serves until a signal, until ``idle_s`` after the last client, or until its folder is gone."""
    os.set_inheritable(lock_fd, False)
    os.set_inheritable(socket_fd, False)
    config = uvicorn.Config(create_app(final=True), log_level="error", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    threading.Thread(target=_watch, args=(server, folder, idle_s), daemon=True).start()
    server.run(sockets=[socket.socket(fileno=socket_fd)])


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
