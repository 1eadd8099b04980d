"""The one way to MLflow: runs, numbers and files by explicit run id.

MLflow's fluent API keeps its active run per thread, and a metric logged from a worker thread would land in a
run of its own, so nothing here is fluent.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from jetway.tasks import environment
from jetway.tasks.artifacts import Handle
from jetway.tasks.errors import TrackingError
from jetway.tasks.tracking.connection import (
    artifact_location,
    embedded_uri,
    one_at_a_time,
    open_client,
    tracking_uri,
    translated,
    without_password,
)
from jetway.tasks.tracking.files import RunFiles
from jetway.tasks.tracking.values import (
    BOOT_TAG,
    FILES_PATH,
    HOST_TAG,
    KIND_TAG,
    METRICS_A_BATCH,
    MODEL_TRAINING,
    NOTE_TAG,
    PARAMS_A_BATCH,
    PARENT_TAG,
    PROCESS_TAG,
    TAGS_A_BATCH,
    Files,
    RunRecord,
    Status,
    metric_name,
    short_tags,
    short_text,
)


class Tracker:
    """One MLflow server or database. Construction touches nothing; the first call opens it.

    ``uri`` defaults to ``MLFLOW_TRACKING_URI``, and without that to a sqlite file in ``JETWAY_HOME`` whose
    artifacts lie beside it. Every method raises TrackingError when MLflow cannot do what it is asked.
    """

    def __init__(self, uri: str | None = None) -> None:
        self.uri = uri or tracking_uri()
        self._experiments: dict[str, str] = {}
        self._lock = threading.RLock()

    @property
    def embedded(self) -> bool:
        """Whether this is the database in ``JETWAY_HOME``, which nobody else owns."""
        return self.uri == embedded_uri()

    def start_run(
        self,
        recipe_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        *,
        run_name: str | None = None,
    ) -> str:
        """Starts the parent run of a pipeline run, in the experiment of its recipe. Returns its run id."""
        return self._create(
            recipe_name, "pipeline", params, {"recipe": recipe_name, **(tags or {})}, run_name
        )

    def start_child(
        self,
        parent_id: str,
        name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Starts the run of one variant on one target under its parent. Returns its run id."""
        parent = self.run(parent_id)
        inherited = {"recipe": parent.tags.get("recipe", parent.experiment), PARENT_TAG: parent_id}
        return self._create(parent.experiment, "variant", params, {**inherited, **(tags or {})}, name)

    def start_stage(self, experiment: str, stage: str, tags: Mapping[str, str]) -> str:
        """Starts the run that will hold one finished stage's files. Returns its run id."""
        return self._create(experiment, "stage", None, tags, stage)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Logs params; a value MLflow would refuse for its length is cut, with a note of that at its end."""
        self._log(run_id, params=params)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float | None], step: int | None = None) -> None:
        """Logs metrics in one batch. What is None was not measured and is left out."""
        self.log_series(run_id, [(step or 0, metrics)])

    def log_series(self, run_id: str, points: Sequence[tuple[int, Mapping[str, float | None]]]) -> None:
        """Logs metrics of many steps (epochs, slices) in as few batches as MLflow allows."""
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, step)
            for step, values in points
            for name, value in values.items()
            if value is not None
        ]
        self._log(run_id, metrics=metrics)

    def log_time_series(
        self, run_id: str, times_s: Sequence[float], columns: Mapping[str, Sequence[float]]
    ) -> None:
        """Logs samples of sensors by time, in as few batches as MLflow allows. NaN was not measured.

        The times count from any moment; the last sample gets the present as its time stamp.
        """
        if not len(times_s):
            return
        zero_ms = time.time() * 1000 - times_s[-1] * 1000
        metrics = [
            Metric(metric_name(name), float(value), int(zero_ms + time_s * 1000), step)
            for name, values in columns.items()
            for step, (time_s, value) in enumerate(zip(times_s, values, strict=True))
            if not math.isnan(value)
        ]
        self._log(run_id, metrics=metrics)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags; an existing tag takes the new value."""
        self._log(run_id, tags=tags)

    def rename(self, run_id: str, name: str) -> None:
        """Gives a run another name."""
        with self._translated(f"rename run {run_id}"):
            self._client.update_run(run_id, name=name)

    def describe(self, run_id: str, markdown: str) -> None:
        """Sets the description that MLflow shows on top of the run's page."""
        self.set_tags(run_id, {NOTE_TAG: markdown})

    def log_files(self, run_id: str, files: Files) -> None:
        """Attaches files by the path a reviewer sees: ``{"prune/pruned.safetensors": (handle, local_path)}``.

        The handles are kept in the run's ``files.json``, so that a later process knows their digests.
        """
        with self._lock:
            self._run_files.attach(run_id, {path: local for path, (_, local) in files.items()})
            handles = self._run_files.handles(run_id) | {path: handle for path, (handle, _) in files.items()}
            self.log_json(run_id, FILES_PATH, self._run_files.remember(run_id, handles))

    def log_json(self, run_id: str, path: str, value: Any) -> None:
        """Attaches a JSON document that is no handle's file."""
        self.log_text(run_id, path, json.dumps(value, indent=1) + "\n")

    def log_text(self, run_id: str, path: str, text: str) -> None:
        """Attaches a text: the recipe as run, the table as Markdown."""
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "text"
            local.write_text(text)
            self._run_files.attach(run_id, {path: local})

    def finish(self, run_id: str, status: Status) -> None:
        """Ends a run as FINISHED, FAILED or KILLED."""
        with self._translated(f"end run {run_id}"):
            self._client.set_terminated(run_id, status)

    def run(self, run_id: str) -> RunRecord:
        """The run of this id."""
        with self._translated(f"read run {run_id}"):
            return self._record(self._client.get_run(run_id))

    def find_run(self, id_or_prefix: str) -> RunRecord:
        """The pipeline run whose id starts with the text, or whose name it is; ``latest`` is the newest.

        Raises TrackingError when there is none, or when several fit.
        """
        if id_or_prefix == "latest":
            found = self.pipeline_runs(limit=1)
        else:
            everything = self.pipeline_runs()
            found = [run for run in everything if run.run_id.startswith(id_or_prefix)]
            found = found or [run for run in everything if run.name == id_or_prefix]
        if len(found) == 1:
            return found[0]
        fits = ", ".join(run.run_id[:8] for run in found)
        problem = f"{len(found)} runs fit {id_or_prefix!r} ({fits})" if found else f"no run {id_or_prefix!r}"
        newest = ", ".join(f"{run.run_id[:8]} ({run.experiment})" for run in self.pipeline_runs(limit=5))
        raise TrackingError(
            f"{problem} in {without_password(self.uri)}. The newest are: {newest or 'none yet'}."
        )

    def newest_run_with(self, path: str) -> RunRecord:
        """The newest finished pipeline run with this file at its top. Raises TrackingError when none has."""
        for run in self.pipeline_runs():
            if run.status == "FINISHED" and self.has_file(run.run_id, path):
                return run
        raise TrackingError(
            f"No run in {without_password(self.uri)} has {path} yet: none has finished. Run jetway run first."
        )

    def pipeline_runs(self, *, limit: int = 10_000) -> list[RunRecord]:
        """Parent runs of every recipe, newest first."""
        return self.search("tags.`jetway.kind` = 'pipeline'", limit=limit)

    def children(self, run_id: str) -> list[RunRecord]:
        """The variants' runs of a pipeline run, oldest first."""
        return self.search(f"tags.`{PARENT_TAG}` = '{run_id}'")[::-1]

    def search(self, query: str, *, experiment: str | None = None, limit: int = 10_000) -> list[RunRecord]:
        """Runs that fit an MLflow search string, newest first; in all experiments unless one is named."""
        with self._translated("search runs"):
            experiments = self._experiment_ids(experiment)
            runs: list[Run] = []
            token: str | None = None
            while experiments and len(runs) < limit:
                page = self._client.search_runs(
                    experiments, query, max_results=min(limit - len(runs), 1000),
                    order_by=["attributes.start_time DESC"], page_token=token,
                )  # fmt: skip
                runs += page
                token = page.token
                if not token:
                    break
            return [self._record(run) for run in runs]

    def has_file(self, run_id: str, path: str) -> bool:
        """Whether a file of this path is attached to the run."""
        return self._run_files.has(run_id, path)

    def load_file(self, run_id: str, path: str, folder: Path) -> Path:
        """Brings an attached file into ``folder`` and returns where it is; a local one stays in its place."""
        return self._run_files.fetch(run_id, path, folder)

    def load_json(self, run_id: str, path: str) -> Any:
        """An attached JSON document."""
        with tempfile.TemporaryDirectory() as folder:
            text = self.load_file(run_id, path, Path(folder)).read_text()
        try:
            return json.loads(text)
        except ValueError as exc:
            raise TrackingError(
                f"{path} of run {run_id} in {without_password(self.uri)} is not JSON: {exc}."
            ) from exc

    def files(self, run_id: str) -> dict[str, Handle]:
        """Handles of what ``log_files`` attached, by path."""
        with self._lock:
            return self._run_files.handles(run_id)

    def page_of(self, run_id: str, path: str) -> str:
        """Where MLflow's pages show an attached file, as a link from any of them: they have one address."""
        with self._translated(f"read run {run_id}"):
            experiment_id = self._client.get_run(run_id).info.experiment_id
        return f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{quote(path)}"

    def reap(self) -> list[str]:
        """Marks as KILLED what processes of this machine left RUNNING when they died. Returns the run ids."""
        query = f"attributes.status = 'RUNNING' AND tags.`{HOST_TAG}` = '{environment.host_id()}'"
        dead = [run.run_id for run in self.search(query) if not _owner_alive(run)]
        for run_id in dead:
            self.finish(run_id, "KILLED")
        return dead

    def delete_run(self, run_id: str) -> None:
        """Deletes a run's record; its files stay where they are."""
        with self._translated(f"delete run {run_id}"):
            self._client.delete_run(run_id)

    def local_folder(self, run_id: str) -> Path | None:
        """Folder of a run's files where that is on this machine, and no server stands before it."""
        return self._run_files.local_folder(run_id)

    @cached_property
    def _client(self) -> MlflowClient:
        with self._lock, self._translated("open"):
            return open_client(self.uri)

    @cached_property
    def _run_files(self) -> RunFiles:
        return RunFiles(self._client, self.uri)

    def _create(
        self,
        experiment: str,
        kind: str,
        params: Mapping[str, Any] | None,
        tags: Mapping[str, str],
        name: str | None,
    ) -> str:
        owner = {
            KIND_TAG: kind,
            HOST_TAG: environment.host_id(),
            BOOT_TAG: environment.boot_id(),
            PROCESS_TAG: environment.process_id(),
        }
        with self._translated(f"start a run of {experiment}"):
            experiment_id = self._experiment_id(experiment)
            run = self._client.create_run(experiment_id, tags={**owner, **short_tags(tags)}, run_name=name)
        self.log_params(run.info.run_id, params or {})
        return str(run.info.run_id)

    def _log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Metric] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        param_list = [Param(key, short_text(value)) for key, value in (params or {}).items()]
        tag_list = [RunTag(key, value) for key, value in short_tags(tags or {}).items()]
        with self._translated(f"log to run {run_id}"):
            while metrics or param_list or tag_list:
                self._client.log_batch(
                    run_id, metrics[:METRICS_A_BATCH], param_list[:PARAMS_A_BATCH], tag_list[:TAGS_A_BATCH]
                )
                metrics = metrics[METRICS_A_BATCH:]
                param_list, tag_list = param_list[PARAMS_A_BATCH:], tag_list[TAGS_A_BATCH:]

    def _experiment_id(self, name: str) -> str:
        with self._lock:
            if name not in self._experiments:
                self._experiments[name] = self._make_experiment(name)
            return self._experiments[name]

    def _make_experiment(self, name: str) -> str:
        client = self._client
        with one_at_a_time(self.uri):
            found = client.get_experiment_by_name(name)
            if found is not None:
                return str(found.experiment_id)
            location = artifact_location(self.uri)
            return str(client.create_experiment(name, location, tags=MODEL_TRAINING))

    def _experiment_ids(self, name: str | None) -> list[str]:
        if name is None:
            return [experiment.experiment_id for experiment in self._client.search_experiments()]
        found = self._client.get_experiment_by_name(name)
        return [found.experiment_id] if found is not None else []

    def _record(self, run: Run) -> RunRecord:
        return RunRecord(
            run_id=run.info.run_id,
            name=run.info.run_name or "",
            experiment=self._experiment_name(run.info.experiment_id),
            status=run.info.status,
            started_ms=run.info.start_time,
            params=run.data.params,
            tags=run.data.tags,
            metrics=run.data.metrics,
        )

    def _experiment_name(self, experiment_id: str) -> str:
        with self._lock:
            names = {known: name for name, known in self._experiments.items()}
            if experiment_id not in names:
                name = str(self._client.get_experiment(experiment_id).name)
                self._experiments[name] = names[experiment_id] = experiment_id
                return name
            return names[experiment_id]

    def _translated(self, what: str) -> AbstractContextManager[None]:
        return translated(self.uri, what)


def _owner_alive(run: RunRecord) -> bool:
    same_boot = run.tags.get(BOOT_TAG, "") == environment.boot_id()
    return same_boot and environment.process_alive(run.tags.get(PROCESS_TAG, ""))
