"""Host keys: showing a target's fingerprint, and recording it once a person has compared it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import paramiko

from jetway.configs.schema import Target
from jetway.tasks.errors import ConfigError, TargetUnreachableError
from jetway.tasks.target.connection import Connection, recorded_hosts


@dataclass(frozen=True)
class HostKey:
    """A host key as the target shows it now."""

    #: As known_hosts names it: the host, or ``[host]:port``.
    hostname: str
    #: Such as ``ssh-ed25519``.
    kind: str
    #: ``SHA256:...``, as ssh-keygen -l prints it.
    fingerprint: str
    base64: str

    @property
    def line(self) -> str:
        return f"{self.hostname} {self.kind} {self.base64}"


def fetch_host_key(target: Target) -> HostKey:
    """Asks the target for its host key, without logging in. Raises TargetUnreachableError."""
    if target.kind == "loopback":
        raise ConfigError(
            f"{target.name}: a loopback target makes its host key anew each time and knows it already. "
            "Nothing needs to be trusted."
        )
    try:
        with Connection(target, unknown_host_key=_Show()) as connection:
            connection.open()
    except _Shown as shown:
        return shown.key
    raise TargetUnreachableError(f"{target.name}: its SSH server showed no host key. Check host and port.")


def record_host_key(key: HostKey) -> Path:
    """Writes the key to ``known_hosts`` under JETWAY_HOME, in place of what was there for the host."""
    path = recorded_hosts()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.split(" ")[0] != key.hostname]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write("\n".join([*kept, key.line]) + "\n")
    os.replace(file.name, path)
    return path


class _Shown(BaseException):
    """Leaves the connection as soon as the key is seen; nobody on the way may take it for an error."""

    def __init__(self, key: HostKey) -> None:
        super().__init__(key.fingerprint)
        self.key = key


class _Show(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        raise _Shown(HostKey(hostname, key.get_name(), key.fingerprint, key.get_base64()))
