"""MLflow as it is: one attempt a call, its own errors. ``tracker.Tracker`` gives it patience and a spool."""

from __future__ import annotations

import threading
from functools import cached_property

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from jetway.tasks.tracking.connection import artifact_location, one_at_a_time, open_client, translated
from jetway.tasks.tracking.files import RunFiles
from jetway.tasks.tracking.spool import NewRun, Write
from jetway.tasks.tracking.values import (
    METRICS_A_BATCH,
    MODEL_TRAINING,
    PARAMS_A_BATCH,
    PARENT_TAG,
    TAGS_A_BATCH,
    TOKEN_TAG,
    RunRecord,
)


class MlflowRuns:
    """Runs of one MLflow server or database. The first call opens it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._experiments: dict[str, str] = {}
        self._lock = threading.RLock()
        #: Ids of runs that were made late, by the token that stood for them.
        self._made: dict[str, str | None] = {}

    @cached_property
    def client(self) -> MlflowClient:
        with self._lock, translated(self._uri, "open"):
            return open_client(self._uri)

    @cached_property
    def files(self) -> RunFiles:
        return RunFiles(self.client, self._uri)

    def find_or_make_run(self, new: NewRun) -> str:
        """For another try: the server may have made the run and died before it said so."""
        made = self.search(f"tags.`{TOKEN_TAG}` = '{new.token}'", new.experiment, 1)
        self._made[new.token] = run_id = made[0].run_id if made else self.make_run(new)
        return run_id

    def drop(self, new: NewRun) -> None:
        """What is written to this run is written nowhere."""
        self._made[new.token] = None

    def make_run(self, new: NewRun) -> str:
        experiment_id = self.experiment_id(new.experiment)
        tags = dict(new.tags)
        if parent := self._made.get(tags.get(PARENT_TAG, "")):
            tags[PARENT_TAG] = parent
        run = self.client.create_run(experiment_id, start_time=new.started_ms, tags=tags, run_name=new.name)
        return str(run.info.run_id)

    def apply(self, write: Write) -> None:
        run_id = self._made.get(write.run_id, write.run_id)
        if run_id is None:
            return
        self._log_batches(run_id, write)
        if write.shared_tags:
            experiment_id = self.client.get_run(run_id).info.experiment_id
            for key, value in write.shared_tags.items():
                self.client.set_experiment_tag(experiment_id, key, value)
        if write.files:
            self.files.attach(run_id, write.files)
        if write.name is not None:
            self.client.update_run(run_id, name=write.name)
        if write.status is not None:
            self.client.set_terminated(run_id, write.status, write.ended_ms)

    def _log_batches(self, run_id: str, write: Write) -> None:
        metrics = [Metric(point.name, point.value, point.timestamp_ms, point.step) for point in write.metrics]
        params = [Param(key, value) for key, value in write.params.items()]
        tags = [RunTag(key, value) for key, value in write.tags.items()]
        while metrics or params or tags:
            self.client.log_batch(
                run_id, metrics[:METRICS_A_BATCH], params[:PARAMS_A_BATCH], tags[:TAGS_A_BATCH]
            )
            metrics = metrics[METRICS_A_BATCH:]
            params, tags = params[PARAMS_A_BATCH:], tags[TAGS_A_BATCH:]

    def search(self, query: str, experiment: str | None, limit: int) -> list[RunRecord]:
        experiments = self._experiment_ids(experiment)
        runs: list[Run] = []
        token: str | None = None
        while experiments and len(runs) < limit:
            page = self.client.search_runs(
                experiments, query, max_results=min(limit - len(runs), 1000),
                order_by=["attributes.start_time DESC"], page_token=token,
            )  # fmt: skip
            runs += page
            token = page.token
            if not token:
                break
        return [self.record(run) for run in runs]

    def experiment_id(self, name: str) -> str:
        with self._lock:
            if name not in self._experiments:
                self._experiments[name] = self._make_experiment(name)
            return self._experiments[name]

    def _make_experiment(self, name: str) -> str:
        client = self.client
        with one_at_a_time(self._uri):
            found = client.get_experiment_by_name(name)
            if found is not None:
                return str(found.experiment_id)
            location = artifact_location(self._uri)
            try:
                return str(client.create_experiment(name, location, tags=MODEL_TRAINING))
            except MlflowException as exc:
                found = client.get_experiment_by_name(name)
                if exc.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                    raise
                return str(found.experiment_id)

    def _experiment_ids(self, name: str | None) -> list[str]:
        if name is None:
            return [experiment.experiment_id for experiment in self.client.search_experiments()]
        found = self.client.get_experiment_by_name(name)
        return [found.experiment_id] if found is not None else []

    def record(self, run: Run) -> RunRecord:
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
                name = str(self.client.get_experiment(experiment_id).name)
                self._experiments[name] = names[experiment_id] = experiment_id
                return name
            return names[experiment_id]
