"""A real SSH server on 127.0.0.1 for the loopback target; it runs in a process of its own.

    python -m jetway.tasks.target.loopback_server HOME

Prints one JSON line with its port and its key folder, then serves until stdin ends or the process that
started it does. Only a key made for this one life is let in.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import asyncssh

BLOCK_BYTES = 1 << 18
PARENT_POLL_S = 0.5


async def serve(home: str) -> None:
    keys = Path(tempfile.mkdtemp(prefix="jetway-loopback-"))
    try:
        host_key, client_key = asyncssh.generate_private_key("ssh-ed25519"), make_client_key(keys)
        server = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[host_key],
            authorized_client_keys=asyncssh.import_authorized_keys(client_key.export_public_key().decode()),
            process_factory=lambda process: run_command(process, home),
            encryption_algs=["aes128-gcm@openssh.com", "aes256-gcm@openssh.com"],
            encoding=None,
            password_auth=False,
            kbdint_auth=False,
            gss_host=None,
            x11_forwarding=False,
            allow_pty=False,
            login_timeout=30,
            # The client looks after the link; a server that is busy with many commands must not end it.
            keepalive_interval=0,
        )
        port = server.get_port()
        public = host_key.export_public_key().decode().strip()
        (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
        print(json.dumps({"port": port, "keys": str(keys)}), flush=True)
        await parent_ends()
        server.close()
    finally:
        shutil.rmtree(keys, ignore_errors=True)


def make_client_key(folder: Path) -> asyncssh.SSHKey:
    key = asyncssh.generate_private_key("ssh-ed25519")
    path = folder / "id_ed25519"
    path.touch(mode=0o600)
    key.write_private_key(str(path))
    return key


async def run_command(process: asyncssh.SSHServerProcess[bytes], home: str) -> None:
    """Runs the command in the user's shell and environment, as sshd does; it outlives the connection."""
    if process.command is None:
        process.exit(1)
        return
    child = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", process.command, cwd=home,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        limit=BLOCK_BYTES,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    feeding = asyncio.create_task(feed(process.stdin, child.stdin))
    try:
        await asyncio.gather(copy(child.stdout, process.stdout), copy(child.stderr, process.stderr))
        report_exit(process, await child.wait())
    finally:
        feeding.cancel()
        child.stdin.close()


def report_exit(process: asyncssh.SSHServerProcess[bytes], status: int) -> None:
    if status < 0:
        process.exit_with_signal(signal.Signals(-status).name.removeprefix("SIG"))
    else:
        process.exit(status)


async def feed(source: asyncssh.SSHReader[bytes], sink: asyncio.StreamWriter) -> None:
    try:
        while block := await source.read(BLOCK_BYTES):
            sink.write(block)
            await sink.drain()
    except (OSError, asyncssh.Error):
        pass  # the command does not want more, or the client is gone
    sink.close()


async def copy(source: asyncio.StreamReader, sink: asyncssh.SSHWriter[bytes]) -> None:
    """Once the client is gone it reads on, so that the command does not block on a full pipe."""
    client_is_there = True
    while block := await source.read(BLOCK_BYTES):
        if client_is_there:
            try:
                sink.write(block)
                await sink.drain()
            except (OSError, asyncssh.Error):
                client_is_there = False


async def parent_ends() -> None:
    """Waits for stdin to end. A pipe that other children inherited stays open, so the parent counts too."""
    parent = os.getppid()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    end = asyncio.create_task(reader.read())
    while not end.done() and os.getppid() == parent:
        await asyncio.wait([end], timeout=PARENT_POLL_S)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
