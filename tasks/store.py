"""Content-addressed files under ``.jetway/store``. A file gets its final name only when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from jetway.tasks.artifacts import Handle, Report, file_sha256
from jetway.tasks.errors import ArtifactError

H = TypeVar("H", bound=Handle)


def jetway_home() -> Path:
    """Folder of all state: ``JETWAY_HOME``, or ``.jetway`` in the current folder."""
    return Path(os.environ.get("JETWAY_HOME", ".jetway")).absolute()


class Store:
    """Files named by their sha256. Construction touches nothing; folders appear on first use."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or jetway_home() / "store"

    def path_of(self, handle: Handle) -> Path:
        return self.root / handle.sha256[:2] / f"{handle.sha256}{handle.suffix}"

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for work in progress, on the store's own disk, removed at the end."""
        parent = self.root / "tmp"
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def add(
        self,
        kind: type[H],
        path: Path,
        *,
        parents: tuple[str, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> H:
        """Moves the file at ``path`` into the store and returns its handle."""
        digest = file_sha256(path)
        handle = kind(  # type: ignore[call-arg]  # each kind names itself
            sha256=digest, size_bytes=path.stat().st_size, parents=parents, metadata=metadata or {}
        )
        final = self.path_of(handle)
        final.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        try:
            os.replace(path, final)
        except OSError:
            self._copy_across_disks(path, final)
        return handle.model_copy(update={"uri": final.as_uri()})

    def add_json(
        self, value: Any, *, parents: tuple[str, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Report:
        with self.scratch() as folder:
            path = folder / "report.json"
            path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
            return self.add(Report, path, parents=parents, metadata=metadata)

    def load_json(self, handle: Report) -> Any:
        return json.loads(self.open(handle).read_text())

    def has(self, handle: Handle) -> bool:
        return self.path_of(handle).exists()

    def open(self, handle: Handle) -> Path:
        """Path of the handle's file, checked against its digest.

        Raises ArtifactError when the file is missing or is not what the handle says.
        """
        path = self.path_of(handle)
        if not path.exists():
            raise ArtifactError(
                f"{handle.kind} {handle.sha256[:12]} is not in the store ({path}). "
                "Run the pipeline again: the stage that makes it will run anew."
            )
        if file_sha256(path) != handle.sha256:
            raise ArtifactError(
                f"{handle.kind} {handle.sha256[:12]} is corrupt: {path} does not match its digest. "
                "Delete the file and run the pipeline again."
            )
        return path

    def _copy_across_disks(self, path: Path, final: Path) -> None:
        with self.scratch() as folder:
            copy = folder / final.name
            shutil.copyfile(path, copy)
            os.replace(copy, final)
        path.unlink()
