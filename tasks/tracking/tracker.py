"""The one way to MLflow: runs, numbers and files by explicit run id.

MLflow's fluent API keeps its active run per thread, and a metric logged from a worker thread would land in a
run of its own, so nothing here is fluent.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from jetway.tasks import environment
from jetway.tasks.artifacts import Handle
from jetway.tasks.errors import TrackingError, TrackingUnreachableError
from jetway.tasks.tracking.connection import (
    answers,
    embedded_uri,
    tracking_uri,
    translated,
    without_password,
)
from jetway.tasks.tracking.mlflow_runs import MlflowRuns
from jetway.tasks.tracking.registry import Champion, Registry
from jetway.tasks.tracking.spool import Line, NewRun, Point, Spool, Write, left_spools
from jetway.tasks.tracking.values import (
    BOOT_TAG,
    FILES_PATH,
    HOST_TAG,
    KIND_TAG,
    NIGHTS,
    NOTE_TAG,
    PARENT_TAG,
    PROCESS_TAG,
    TOKEN_TAG,
    ChildKind,
    Files,
    RunRecord,
    Status,
    metric_name,
    short_tags,
    short_text,
)
from jetway.tasks.tracking.view import VARIANTS, variants_view

logger = logging.getLogger("jetway")

#: How long a run waits for an MLflow that is away, before its writes are spooled and its questions fail.
RUN_PATIENCE_S = 60.0
#: The same for commands, which have nothing to lose.
PATIENCE_S = 10.0
#: How long a run that is at its end waits, to hand over what it has spooled.
HANDOVER_S = 60.0
POLL_S = 1.0
# How often a run that spools looks whether MLflow is back.
LOOK_S = 15.0

PIPELINE = f"tags.`{KIND_TAG}` = 'pipeline'"
_FULL_ID = re.compile("[0-9a-f]{32}")

#: Kinds of runs that do not begin without MLflow; others can be made later.
MUST_BEGIN = ("pipeline", "nightly")

Answer = TypeVar("Answer")


class Tracker:
    """One MLflow server or database. Construction touches nothing; the first call opens it.

    ``uri`` defaults to ``MLFLOW_TRACKING_URI``, and without that to a sqlite file in ``JETWAY_HOME`` whose
    artifacts lie beside it. Every method raises TrackingError when MLflow cannot do what it is asked.

    When a server is away for longer than ``run_patience_s``, what is written to runs that this tracker started
    goes to a spool on this machine's disk, and ``replay`` hands it over.
    """

    def __init__(self, uri: str | None = None, *, run_patience_s: float = RUN_PATIENCE_S) -> None:
        self.uri = uri or tracking_uri()
        self._run_patience_s = run_patience_s
        self._mlflow = MlflowRuns(self.uri)
        self._lock = threading.RLock()
        self._spool = Spool(without_password(self.uri))
        #: Experiment of each run that this tracker started.
        self._started: dict[str, str] = {}
        self._away_since_s: float | None = None
        self._looked_s = 0.0

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
        *,
        kind: ChildKind = "variant",
    ) -> str:
        """Starts a run under its parent: of one variant on one target, or of a fallback. Returns its run id."""
        experiment = (
            self._started[parent_id] if parent_id in self._started else self.run(parent_id).experiment
        )
        inherited = {"recipe": experiment, PARENT_TAG: parent_id}
        return self._create(experiment, kind, params, {**inherited, **(tags or {})}, name)

    def start_stage(self, experiment: str, stage: str, tags: Mapping[str, str], *, unless: str) -> str:
        """Starts the run that will hold one finished stage's files. Returns its run id.

        Where it can be made only later, it is not made if a run fits the search string ``unless`` by then.
        """
        return self._create(experiment, "stage", None, tags, stage, unless=unless)

    def start_night(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> str:
        """Starts the run of a night, which holds what it says of each recipe and target. Returns its run id."""
        return self._create(NIGHTS, "nightly", params, dict(tags or {}), name)

    def start_comparison(self, night_id: str, name: str, tags: Mapping[str, str]) -> str:
        """Starts the run of one recipe on one target in a night. Returns its run id."""
        return self._create(NIGHTS, "comparison", None, {PARENT_TAG: night_id, **tags}, name)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Logs params; a value MLflow would refuse for its length is cut, with a note of that at its end."""
        self._log(run_id, params=params)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float | None], step: int | None = None) -> None:
        """Logs metrics in one batch. What is None was not measured and is left out."""
        self.log_series(run_id, [(step or 0, metrics)])

    def log_series(self, run_id: str, points: Sequence[tuple[int, Mapping[str, float | None]]]) -> None:
        """Logs metrics of many steps (epochs, slices) in as few batches as MLflow allows."""
        now = _now_ms()
        metrics = [
            Point(name=name, value=float(value), timestamp_ms=now, step=step)
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
            Point(
                name=metric_name(name),
                value=float(value),
                timestamp_ms=int(zero_ms + time_s * 1000),
                step=step,
            )
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
        self._write(Write(run_id=run_id, name=name))

    def describe(self, run_id: str, markdown: str) -> None:
        """Sets the description that MLflow shows on top of the run's page."""
        self.set_tags(run_id, {NOTE_TAG: markdown})

    def share_view(self, run_id: str, scores: Sequence[str]) -> None:
        """Sets the columns of the table of all variants of the run's recipe: ``scores`` and what all recipes have."""
        self._write(Write(run_id=run_id, shared_tags=variants_view(scores)))

    def log_files(self, run_id: str, files: Files) -> None:
        """Attaches files by the path a reviewer sees: ``{"prune/pruned.safetensors": (handle, local_path)}``.

        The handles are kept in the run's ``files.json``, so that a later process knows their digests.
        """
        with self._lock:
            self._write(Write(run_id=run_id, files={path: local for path, (_, local) in files.items()}))
            handles = self._mlflow.files.handles(run_id) | {
                path: handle for path, (handle, _) in files.items()
            }
            self.log_json(run_id, FILES_PATH, self._mlflow.files.remember(run_id, handles))

    def log_json(self, run_id: str, path: str, value: Any) -> None:
        """Attaches a JSON document that is no handle's file."""
        self.log_text(run_id, path, json.dumps(value, indent=1) + "\n")

    def log_text(self, run_id: str, path: str, text: str) -> None:
        """Attaches a text: the recipe as run, the table as Markdown."""
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "text"
            local.write_text(text)
            self._write(Write(run_id=run_id, files={path: local}))

    def finish(self, run_id: str, status: Status) -> None:
        """Ends a run as FINISHED, FAILED or KILLED."""
        self._write(Write(run_id=run_id, status=status, ended_ms=_now_ms()))

    def replay(self, wait_s: float = HANDOVER_S) -> bool:
        """Hands over what was spooled, waiting ``wait_s`` for MLflow. False when it is still away."""
        deadline = time.monotonic() + wait_s
        while self._spool.waiting and not self._replay_now():
            if time.monotonic() >= deadline:
                logger.warning(
                    "MLflow at %s is away. %d writes wait in %s; the next run hands them over, or: jetway replay",
                    without_password(self.uri), self._spool.waiting, self._spool.folder,
                )  # fmt: skip
                return False
            time.sleep(POLL_S)
        return True

    def replay_left(self) -> int:
        """Hands over what dead processes of this home left for this MLflow. Returns how many writes that were."""
        done = 0
        for left in left_spools():
            if left.uri == without_password(self.uri):
                left.replay(self._send)
                done += len(left)
            else:
                logger.warning("%d writes for MLflow at %s wait in %s", len(left), left.uri, left.folder)
        return done

    def run(self, run_id: str) -> RunRecord:
        """The run of this id."""
        return self._ask(
            f"read run {run_id}", lambda: self._mlflow.record(self._mlflow.client.get_run(run_id))
        )

    def find_run(self, id_or_prefix: str) -> RunRecord:
        """The pipeline run or fallback whose id starts with the text, or whose name it is; ``latest`` is the newest
        pipeline run.

        Raises TrackingError when there is none, or when several fit.
        """
        if id_or_prefix == "latest":
            found = self.pipeline_runs(limit=1)
        elif _FULL_ID.fullmatch(id_or_prefix):
            found = self._whole_runs(id_or_prefix)
        else:
            everything = self.pipeline_runs() + self.search(f"tags.`{KIND_TAG}` = 'fallback'")
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

    def _whole_runs(self, run_id: str) -> list[RunRecord]:
        """The run of this id. Raises TrackingError for one of a variant, which is a part of another."""
        found = self.search(f"attributes.run_id = '{run_id}'")
        for run in found:
            if run.tags.get(KIND_TAG) == "variant":
                raise TrackingError(
                    f"{run_id[:8]} is a variant of run {run.tags[PARENT_TAG][:8]}, {run.name}. Name that run."
                )
        return [run for run in found if run.tags.get(KIND_TAG) in ("pipeline", "fallback")]

    def newest_run_with(self, path: str) -> RunRecord:
        """The newest ended pipeline run with this file at its top; one of a fleet may have ended as FAILED.

        Raises TrackingError when none has.
        """
        for run in self.pipeline_runs():
            if run.status in ("FINISHED", "FAILED") and self.has_file(run.run_id, path):
                return run
        raise TrackingError(
            f"No run in {without_password(self.uri)} has {path} yet: none has finished. Run jetway run first."
        )

    def pipeline_runs(self, *, limit: int = 10_000) -> list[RunRecord]:
        """Parent runs of every recipe, newest first."""
        return self.search(PIPELINE, limit=limit)

    def children(self, run_id: str) -> list[RunRecord]:
        """The runs right below a run but fallbacks, oldest first: of a pipeline run its variants."""
        return self._below(run_id, f"tags.`{KIND_TAG}` != 'fallback'")

    def fallbacks(self, run_id: str) -> list[RunRecord]:
        """The fallbacks that a pipeline run tried, oldest first; each has variants below it."""
        return self._below(run_id, f"tags.`{KIND_TAG}` = 'fallback'")

    def _below(self, run_id: str, kind: str) -> list[RunRecord]:
        return self.search(f"tags.`{PARENT_TAG}` = '{run_id}' AND {kind}")[::-1]

    def search(self, query: str, *, experiment: str | None = None, limit: int = 10_000) -> list[RunRecord]:
        """Runs that fit an MLflow search string, newest first; in all experiments unless one is named."""
        return self._ask("search runs", lambda: self._mlflow.search(query, experiment, limit))

    def has_file(self, run_id: str, path: str) -> bool:
        """Whether a file of this path is attached to the run."""
        return self._ask(f"list the files of run {run_id}", lambda: self._mlflow.files.has(run_id, path))

    def load_file(self, run_id: str, path: str, folder: Path) -> Path:
        """Brings an attached file into ``folder`` and returns where it is; a local one stays in its place."""
        return self._ask(f"fetch {path}", lambda: self._mlflow.files.fetch(run_id, path, folder))

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
            return self._ask(f"read {FILES_PATH}", lambda: self._mlflow.files.handles(run_id))

    def page_of(self, run_id: str, path: str) -> str:
        """Where MLflow's pages show an attached file, as a link from any of them: they have one address."""
        return f"{self.page_of_run(run_id)}/artifacts/{quote(path)}"

    def page_of_run(self, run_id: str) -> str:
        """Where MLflow's pages show a run, as a link from any of them."""
        return f"{self._page_of_runs(run_id)}/{run_id}"

    def page_of_view(self, run_id: str) -> str:
        """Where MLflow's pages show the table of all variants of the run's recipe, as a link from any of them."""
        return f"{self._page_of_runs(run_id)}?viewStateShareKey={VARIANTS}"

    def _page_of_runs(self, run_id: str) -> str:
        experiment = self._started[run_id] if run_id in self._started else self.run(run_id).experiment
        experiment_id = self._ask(
            f"read experiment {experiment}", lambda: self._mlflow.experiment_id(experiment)
        )
        return f"#/experiments/{experiment_id}/runs"

    def champion(self, model: str) -> Champion | None:
        """The champion of a registered model; None before the first promotion."""
        return self._ask(f"look up the champion of {model}", lambda: self._registry.champion(model))

    def champions(self) -> list[Champion]:
        """Those of all registered models."""
        return self._ask("list the champions", lambda: self._registry.champions())

    def promote(self, model: str, child_id: str, description: str, tags: Mapping[str, str]) -> Champion:
        """Makes the run of a variant the champion: a version with its files, and the alias at it."""
        return self._ask(
            f"promote run {child_id} to {model}",
            lambda: self._registry.promote(model, child_id, description, tags),
        )

    def reap(self) -> list[str]:
        """Marks as KILLED what processes of this machine left RUNNING when they died. Returns the run ids.

        What they spooled is handed over first, as the end of a run may be among it.
        """
        self.replay_left()
        query = f"attributes.status = 'RUNNING' AND tags.`{HOST_TAG}` = '{environment.host_id()}'"
        dead = [run.run_id for run in self.search(query) if self.is_abandoned(run)]
        for run_id in dead:
            self.finish(run_id, "KILLED")
        return dead

    def is_abandoned(self, run: RunRecord) -> bool:
        """Whether the process of a run is gone; False for another machine's, of which nothing is known."""
        return run.tags.get(HOST_TAG) == environment.host_id() and not _owner_alive(run)

    def delete_run(self, run_id: str) -> None:
        """Deletes a run's record; its files stay where they are."""
        self._ask(f"delete run {run_id}", lambda: self._mlflow.client.delete_run(run_id))

    def local_folder(self, run_id: str) -> Path | None:
        """Folder of a run's files where that is on this machine, and no server stands before it."""
        return self._ask(f"read run {run_id}", lambda: self._mlflow.files.local_folder(run_id))

    @cached_property
    def _registry(self) -> Registry:
        return Registry(self._mlflow.client, self.uri)

    def _create(
        self,
        experiment: str,
        kind: str,
        params: Mapping[str, Any] | None,
        tags: Mapping[str, str],
        name: str | None,
        *,
        unless: str | None = None,
    ) -> str:
        token = uuid.uuid4().hex
        owner = {
            KIND_TAG: kind,
            HOST_TAG: environment.host_id(),
            BOOT_TAG: environment.boot_id(),
            PROCESS_TAG: environment.process_id(),
            TOKEN_TAG: token,
        }
        new = NewRun(
            token=token,
            experiment=experiment,
            name=name,
            tags={**owner, **short_tags(tags)},
            started_ms=_now_ms(),
            unless=unless,
        )
        run_id = self._start(new, may_wait=kind not in MUST_BEGIN)
        self._started[run_id] = experiment
        self._mlflow.files.remember(run_id, {})
        self.log_params(run_id, params or {})
        return run_id

    def _start(self, new: NewRun, *, may_wait: bool) -> str:
        """Makes the run, or where it ``may_wait`` spools it; then its token stands for it."""
        if may_wait and self._must_spool():
            self._spool.append(new)
            return new.token
        tries = iter([self._mlflow.make_run])
        try:
            return self._ask(
                f"start a run of {new.experiment}",
                lambda: next(tries, self._mlflow.find_or_make_run)(new),
                self._run_patience_s,
            )
        except TrackingUnreachableError:
            if not may_wait:
                raise
            self._spool.append(new)
            return new.token

    def _log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Point] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        texts = {key: short_text(value) for key, value in (params or {}).items()}
        self._write(Write(run_id=run_id, metrics=tuple(metrics), params=texts, tags=short_tags(tags or {})))

    def _write(self, write: Write) -> None:
        """Tells MLflow, or the spool while MLflow is away; what is spooled goes before what comes later."""
        ours = write.run_id in self._started
        if ours and self._must_spool():
            self._spool.append(write)
            return
        try:
            self._ask(f"write to run {write.run_id}", lambda: self._mlflow.apply(write))
        except TrackingUnreachableError:
            if not ours:
                raise
            logger.warning("MLflow at %s is away: this run's writes are spooled", without_password(self.uri))
            self._spool.append(write)

    def _must_spool(self) -> bool:
        """Whether something is spooled already and cannot be handed over now."""
        if not self._spool.waiting:
            return False
        if time.monotonic() - self._looked_s < LOOK_S:
            return True
        return not self._replay_now()

    def _replay_now(self) -> bool:
        self._looked_s = time.monotonic()
        if not answers(self.uri):
            return False
        try:
            self._spool.replay(self._send)
        except TrackingUnreachableError:
            return False
        return True

    def _send(self, line: Line) -> bool:
        """Hands over a line of a spool. False when MLflow refuses it, which no later try would change."""
        try:
            with translated(self.uri, "take what was spooled"):
                if isinstance(line, Write):
                    self._mlflow.apply(line)
                elif line.unless and self._mlflow.search(line.unless, line.experiment, 1):
                    self._mlflow.drop(line)
                else:
                    self._mlflow.find_or_make_run(line)
        except TrackingUnreachableError:
            raise
        except TrackingError as exc:
            logger.warning("%s", exc)
            return False
        return True

    def _ask(self, what: str, call: Callable[[], Answer], patience_s: float | None = None) -> Answer:
        """Calls MLflow, again and again while it is away; a run has more patience than a command."""
        if patience_s is None:
            patience_s = self._run_patience_s if self._started else PATIENCE_S
        while True:
            try:
                with translated(self.uri, what):
                    answer = call()
            except TrackingUnreachableError:
                if not self._keep_waiting(patience_s):
                    raise
                time.sleep(POLL_S)
            else:
                self._away_since_s = None
                return answer

    def _keep_waiting(self, patience_s: float) -> bool:
        """Patience counts from when MLflow was first missed, not from each call."""
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            logger.warning(
                "MLflow at %s does not answer; waiting up to %.0f s", without_password(self.uri), patience_s
            )
        return time.monotonic() - self._away_since_s < patience_s


def _now_ms() -> int:
    return int(time.time() * 1000)


def _owner_alive(run: RunRecord) -> bool:
    same_boot = run.tags.get(BOOT_TAG, "") == environment.boot_id()
    return same_boot and environment.process_alive(run.tags.get(PROCESS_TAG, ""))
