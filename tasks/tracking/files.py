"""The files of MLflow runs: linked where the artifacts lie on this machine, sent where they do not."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from mlflow import MlflowClient

from jetway.tasks.artifacts import Handle
from jetway.tasks.tracking.connection import place_file, translated
from jetway.tasks.tracking.values import FILES_PATH, HANDLES


class RunFiles:
    """Attaches files to runs, brings them back, and remembers their handles."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self._client = client
        self._uri = uri
        self._folders: dict[str, Path | None] = {}
        self._handles: dict[str, dict[str, Handle]] = {}

    def attach(self, run_id: str, files: Mapping[str, Path]) -> None:
        """Hard-links files on the same disk, copies or sends them elsewhere."""
        folder = self.local_folder(run_id)
        with translated(self._uri, f"attach {', '.join(files)} to run {run_id}"):
            if folder is not None:
                _place_files(files, folder)
                return
            with tempfile.TemporaryDirectory() as outbox:
                _place_files(files, Path(outbox))
                self._client.log_artifacts(run_id, outbox)

    def fetch(self, run_id: str, path: str, folder: Path) -> Path:
        """Brings a file into ``folder``; one that lies on this machine stays in its place."""
        local = self.local_folder(run_id)
        if local is not None and (local / path).is_file():
            return local / path
        with translated(self._uri, f"fetch {path} of run {run_id}"):
            return Path(self._client.download_artifacts(run_id, path, str(folder)))

    def has(self, run_id: str, path: str) -> bool:
        """Whether a file of this path is attached to the run."""
        folder = path.rpartition("/")[0] or None
        with translated(self._uri, f"list the files of run {run_id}"):
            return path in [file.path for file in self._client.list_artifacts(run_id, folder)]

    def handles(self, run_id: str) -> dict[str, Handle]:
        """Handles of the attached files, by path."""
        if run_id not in self._handles:
            self._handles[run_id] = self._recorded(run_id)
        return dict(self._handles[run_id])

    def remember(self, run_id: str, handles: Mapping[str, Handle]) -> dict[str, Any]:
        """Takes handles as the run's, and returns the document to keep them in."""
        self._handles[run_id] = dict(handles)
        return {path: handle.model_dump(mode="json") for path, handle in handles.items()}

    def local_folder(self, run_id: str) -> Path | None:
        """Folder of a run's files where it is on this machine, and no server stands before it."""
        if run_id not in self._folders:
            with translated(self._uri, f"read run {run_id}"):
                uri = urlparse(self._client.get_run(run_id).info.artifact_uri)
            local = uri.scheme in ("", "file") and not self._uri.startswith("http")
            self._folders[run_id] = Path(unquote(uri.path)) if local else None
        return self._folders[run_id]

    def _recorded(self, run_id: str) -> dict[str, Handle]:
        if not self.has(run_id, FILES_PATH):
            return {}
        with tempfile.TemporaryDirectory() as folder:
            text = self.fetch(run_id, FILES_PATH, Path(folder)).read_text()
        return dict(HANDLES.validate_python(json.loads(text)))


def _place_files(files: Mapping[str, Path], folder: Path) -> None:
    for path, local in files.items():
        place_file(local, folder / path)
