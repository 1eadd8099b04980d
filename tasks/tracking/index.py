"""The index of finished stages, in MLflow, so that workers with homes of their own share it."""

from __future__ import annotations

import logging
import os
import threading

from pydantic import ValidationError

from jetway.tasks.artifacts import Handle, StageOutput, file_sha256
from jetway.tasks.errors import ArtifactError, TrackingError, TrackingUnreachableError
from jetway.tasks.store import Store
from jetway.tasks.tracking.connection import place_file
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import RunRecord

logger = logging.getLogger("jetway")

EXPERIMENT = "jetway-stages"
STAGE_TAG = "jetway.stage"
KEY_TAG = "jetway.stage_key"
OUTPUT_PATH = "output.json"
#: Document of a pipeline run: which stages it used, by key.
STAGES_PATH = "stages.json"
# Entries of one key that are tried, newest first, before the stage runs anew.
ENTRIES_TRIED = 3


class MlflowStageIndex:
    """One MLflow run a finished stage: the key as a tag, the output as JSON, its files as artifacts.

    With ``run_id``, the keys that a pipeline run uses are kept in its ``stages.json``; ``jetway clean`` reads
    them. Safe to call from several threads.
    """

    def __init__(self, tracker: Tracker, store: Store, *, run_id: str | None = None) -> None:
        self._tracker = tracker
        self._store = store
        self._run_id = run_id
        self._used: dict[str, dict[str, str | bool]] = {}
        self._lock = threading.Lock()

    def find(self, key: str) -> StageOutput | None:
        """The output recorded under this key, its files verified and in the store; None to run the stage."""
        for entry in self._entries(key):
            try:
                output = self._bring(entry)
            except (ArtifactError, TrackingError, ValidationError) as exc:
                logger.warning("%s: a recorded result cannot be reused: %s", entry.tags[STAGE_TAG], exc)
                continue
            self._note(key, entry.tags[STAGE_TAG], reused=True)
            return output
        return None

    def record(self, key: str, stage: str, output: StageOutput, seconds: float) -> None:
        """Records a finished stage. The entry counts only once all of its files are in."""
        tags = {STAGE_TAG: stage, KEY_TAG: key}
        run_id = self._tracker.start_stage(EXPERIMENT, stage, tags, unless=_finished(key))
        paths = {handle.sha256: self._store.open(handle) for handle in output.handles()}
        files = {_file_path(handle): (handle, paths[handle.sha256]) for handle in output.handles()}
        self._tracker.log_files(run_id, files)
        self._tracker.log_json(run_id, OUTPUT_PATH, output.model_dump(mode="json"))
        self._tracker.log_metrics(run_id, {"stage_s": seconds, **output.metrics})
        self._tracker.finish(run_id, "FINISHED")
        self._note(key, stage, reused=False)

    def entries(self) -> list[RunRecord]:
        """Every entry, newest first; one that is not FINISHED never counts as a result."""
        return self._tracker.search("", experiment=EXPERIMENT)

    def _entries(self, key: str) -> list[RunRecord]:
        """None while MLflow is away: then the stage runs, and is not recorded twice."""
        try:
            return self._tracker.search(_finished(key), experiment=EXPERIMENT, limit=ENTRIES_TRIED)
        except TrackingUnreachableError as exc:
            logger.warning("the stage runs without a look for its result: %s", exc)
            return []

    def _bring(self, entry: RunRecord) -> StageOutput:
        output = StageOutput.model_validate(self._tracker.load_json(entry.run_id, OUTPUT_PATH))
        for handle in set(output.handles()):
            self._bring_file(entry, handle)
        return output

    def _bring_file(self, entry: RunRecord, handle: Handle) -> None:
        """Takes the file from the store, or where it is missing or corrupt there, from MLflow.

        Its time of change becomes now: `jetway clean` spares what a running pipeline has just taken up.
        """
        try:
            path = self._store.open(handle)
        except ArtifactError:
            self._download(entry, handle)
            path = self._store.open(handle)
        os.utime(path)

    def _download(self, entry: RunRecord, handle: Handle) -> None:
        with self._store.scratch() as folder:
            found = self._tracker.load_file(entry.run_id, _file_path(handle), folder)
            if file_sha256(found) != handle.sha256:
                raise ArtifactError(
                    f"{handle.kind} {handle.sha256[:12]} is corrupt in MLflow too (run {entry.run_id}). "
                    "The stage runs anew."
                )
            incoming = folder / "incoming"
            place_file(found, incoming)
            self._store.add(type(handle), incoming)

    def _note(self, key: str, stage: str, *, reused: bool) -> None:
        if self._run_id is None:
            return
        with self._lock:
            self._used[key] = {"stage": stage, "key": key, "reused": reused}
            document = {"schema_version": 1, "stages": list(self._used.values())}
            self._tracker.log_json(self._run_id, STAGES_PATH, document)


def used_keys(tracker: Tracker, run_id: str) -> set[str]:
    """Keys of the stages that a pipeline run used; none for a run that ended before its first stage."""
    try:
        document = tracker.load_json(run_id, STAGES_PATH)
    except TrackingError:
        return set()
    return {entry["key"] for entry in document["stages"]}


def _finished(key: str) -> str:
    return f"attributes.status = 'FINISHED' AND tags.`{KEY_TAG}` = '{key}'"


def _file_path(handle: Handle) -> str:
    return f"files/{handle.sha256}{handle.suffix}"
