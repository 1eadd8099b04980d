"""A PostgreSQL of the tests' own, from Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from doubles.servers import free_port

PASSWORD = "administrator"


class Postgres:
    """A private cluster in a folder of its own; it refuses to run as root."""

    def __init__(self, folder: Path) -> None:
        self.bin = next(Path("/usr/lib/postgresql").glob("*/bin"), None)
        if self.bin is None:
            pytest.skip("needs PostgreSQL (apt-get install postgresql)")
        self.folder = folder
        self.port = free_port()
        self.user = "postgres" if os.geteuid() == 0 else None
        if self.user:
            shutil.chown(folder, self.user)

    @property
    def url(self) -> str:
        """The administrator's own database."""
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        data = self.folder / "data"
        (self.folder / "password").write_text(PASSWORD)
        (self.folder / "password").chmod(0o644)
        self.run("initdb", "--pgdata", data, "--username", "postgres", "--auth-host", "scram-sha-256",
                 "--auth-local", "trust", "--pwfile", self.folder / "password", "--no-sync")  # fmt: skip
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self.run("pg_ctl", "start", "--wait", "--pgdata", data, "--log", self.folder / "log", "-o", options)

    def stop(self) -> None:
        self.run("pg_ctl", "stop", "--mode", "immediate", "--pgdata", self.folder / "data")

    def run(self, command: str, *arguments: object) -> None:
        assert self.bin is not None
        subprocess.run(
            [str(self.bin / command), *map(str, arguments)],
            user=self.user, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="jetway-postgres-") as folder:
        postgres = Postgres(Path(folder))
        postgres.start()
        try:
            yield postgres
        finally:
            postgres.stop()
