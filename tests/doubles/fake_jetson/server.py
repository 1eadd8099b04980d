"""The SSH server of a fake Jetson. What it runs has the environment that it was started with.

    python server.py FOLDER PORT

``FOLDER`` holds ``home``, where commands start, and ``ssh``, whose keys are made when they are missing. Prints the
port as a JSON line, then serves until stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import asyncssh

from jetway.tasks.target.loopback_server import parent_ends, run_command


async def serve(folder: Path, port: int) -> None:
    keys = folder / "ssh"
    keys.mkdir(mode=0o700, exist_ok=True)
    host_key, client_key = key_in(keys / "host_key"), key_in(keys / "id_ed25519")
    server = await asyncssh.listen(
        "127.0.0.1",
        port,
        server_host_keys=[host_key],
        authorized_client_keys=asyncssh.import_authorized_keys(client_key.export_public_key().decode()),
        process_factory=lambda process: run_command(process, str(folder / "home")),
        encoding=None,
        password_auth=False,
        kbdint_auth=False,
        gss_host=None,
        allow_pty=False,
        keepalive_interval=0,
    )
    port = server.get_port()
    (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key.export_public_key().decode().strip()}\n")
    print(json.dumps({"port": port}), flush=True)
    await parent_ends()
    server.close()


def key_in(path: Path) -> asyncssh.SSHKey:
    if not path.exists():
        path.touch(mode=0o600)
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(path))
    return asyncssh.read_private_key(str(path))


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
