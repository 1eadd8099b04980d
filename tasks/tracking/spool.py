"""What MLflow could not be told yet: kept in order on this machine's disk, and handed over once it is back.

A spool is a folder under ``JETWAY_HOME/spool``: ``writes.jsonl``, a line for each write, on the disk before
the run goes on, and ``files/``, the files of these writes by digest. Its process locks it, so that another
one takes only what a dead process left. Every line may be sent twice and leaves the same as once, because
time stamps are fixed when the line is made and a new run carries a token of its own; so a handover that
breaks off starts over.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from jetway.tasks.artifacts import SCHEMA_VERSION, file_sha256
from jetway.tasks.store import jetway_home
from jetway.tasks.tracking.connection import place_file
from jetway.tasks.tracking.values import Status

logger = logging.getLogger("jetway")

LINES = "writes.jsonl"
REFUSED = "refused.jsonl"


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Header(_Line):
    """First line of a spool. ``uri`` is MLflow's address without what must stay secret."""

    schema_version: int = SCHEMA_VERSION
    uri: str


class NewRun(_Line):
    """A run to be made, which later lines call by its token. It is not made if a run fits ``unless``."""

    token: str
    experiment: str
    name: str | None
    tags: dict[str, str]
    started_ms: int
    unless: str | None = None


class Point(_Line):
    name: str
    value: float
    timestamp_ms: int
    step: int


class Write(_Line):
    """What one run gets; what is not given stays as it is. ``files`` are by the path in MLflow.

    ``shared_tags`` are tags of the run's experiment.
    """

    run_id: str
    metrics: tuple[Point, ...] = ()
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    shared_tags: dict[str, str] = {}
    name: str | None = None
    files: dict[str, Path] = {}
    status: Status | None = None
    ended_ms: int | None = None


Line = NewRun | Write
#: Hands one line to MLflow; False when MLflow refuses it for good.
Send = Callable[[Line], bool]
_LINE: TypeAdapter[Line] = TypeAdapter(Line)


class Spool:
    """The spool of this process. Nothing is made on the disk before the first line."""

    def __init__(self, uri: str) -> None:
        self.folder = _new_folder()
        self._uri = uri
        self._file: IO[bytes] | None = None
        self._sent = 0
        self._all_taken = True
        self._lines: list[Line] = []
        self._lock = threading.RLock()

    @property
    def waiting(self) -> int:
        """Lines that are still to be sent."""
        return len(self._lines) - self._sent

    def append(self, line: Line) -> None:
        """Returns once the line and its files are on the disk."""
        with self._lock:
            if self._file is None:
                self._open()
            kept = self._with_own_files(line) if isinstance(line, Write) else line
            self._write(kept)
            self._lines.append(kept)

    def replay(self, send: Send) -> None:
        """Sends what waits, and removes the spool. An error of ``send`` ends it; the next call goes on there."""
        with self._lock:
            while self.waiting:
                self._all_taken &= send(self._lines[self._sent])
                self._sent += 1
            if self._file is not None:
                _put_away(self.folder, self._all_taken)
                self._file.close()
                self._file, self._lines, self._sent, self._all_taken = None, [], 0, True
                self.folder = _new_folder()

    def _open(self) -> None:
        (self.folder / "files").mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / LINES).open("wb")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._write(Header(uri=self._uri))

    def _with_own_files(self, write: Write) -> Write:
        return write.model_copy(update={"files": {path: self._keep(f) for path, f in write.files.items()}})

    def _keep(self, path: Path) -> Path:
        """Hard-linked or copied, by digest: ``jetway clean`` may remove the file that was given."""
        kept = self.folder / "files" / f"{file_sha256(path)}{path.suffix}"
        if not kept.exists():
            place_file(path, kept)
            _sync(kept)
        return kept

    def _write(self, line: BaseModel) -> None:
        assert self._file is not None
        self._file.write(line.model_dump_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


class LeftSpool:
    """What a process that is gone has left, in the order in which it was written."""

    def __init__(self, folder: Path, text: bytes) -> None:
        # The last line may be torn: its writer died before it counted as written.
        header, *lines = [line for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
        self.folder = folder
        self.uri = Header.model_validate_json(header).uri
        self._lines = [_LINE.validate_json(line) for line in lines]

    def __len__(self) -> int:
        return len(self._lines)

    def replay(self, send: Send) -> None:
        """Sends all of it, and removes the spool. After an error of ``send`` the next replay begins anew."""
        _put_away(self.folder, all([send(line) for line in self._lines]))


def left_spools() -> Iterator[LeftSpool]:
    """The spools of this home whose process is gone, oldest first, each locked while it is looked at."""
    paths = list((jetway_home() / "spool").glob(f"*/{LINES}"))
    for path in sorted(paths, key=_written_s):
        with suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            handed_over = not path.exists()
            if handed_over or b"\n" not in (text := file.read()):
                continue
            try:
                left = LeftSpool(path.parent, text)
            except ValidationError as exc:
                logger.warning("%s stays, as another version of Jetway wrote it: %s", path, exc)
                continue
            yield left


def _written_s(path: Path) -> float:
    """When it was written last; 0 for what another process has handed over meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _new_folder() -> Path:
    return jetway_home() / "spool" / uuid.uuid4().hex[:12]


def _put_away(folder: Path, all_taken: bool) -> None:
    """What MLflow refused stays to be looked at, under a name that no replay takes up."""
    if all_taken:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        (folder / LINES).rename(folder / REFUSED)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
