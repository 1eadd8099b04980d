"""One deployment in progress: what its stages use, and where its record goes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml
from prefect.runtime import flow_run
from pydantic import BaseModel

from jetway.configs.load import load_recipe, load_targets
from jetway.configs.schema import Recipe, Stage, Target, Variant
from jetway.flows.zombies import FLOW_RUN_TAG, end_zombies
from jetway.tasks import environment
from jetway.tasks.artifacts import Handle, StageOutput
from jetway.tasks.cascade import check_cascade
from jetway.tasks.clip import check_stream
from jetway.tasks.gates import check_gate_metrics
from jetway.tasks.quarantine import without_quarantined
from jetway.tasks.results import TargetOutcome, metric_names
from jetway.tasks.stage import FinishedStage, Progress, StageContext, no_progress
from jetway.tasks.store import Store
from jetway.tasks.table import outcome_line
from jetway.tasks.tracking.index import MlflowStageIndex
from jetway.tasks.tracking.tracker import HANDOVER_S, Tracker
from jetway.tasks.tracking.values import Status, flat_params
from jetway.tasks.workload import load_workload, workload_digest

logger = logging.getLogger("jetway")

H = TypeVar("H", bound=Handle)


class Observer:
    """What the caller of a flow in the same process learns as it goes. The default one only remembers."""

    progress: Progress = staticmethod(no_progress)

    def __init__(self) -> None:
        self.run_id = ""
        self.stages: list[FinishedStage] = []

    def on_start(self, run_id: str) -> None:
        self.run_id = run_id

    def on_finish(self, stage: FinishedStage) -> None:
        self.stages.append(stage)


class SecondObserver(Observer):
    """For a run beside the one that is observed: its stages are told as that one's, its number is not."""

    def __init__(self, first: Observer) -> None:
        super().__init__()
        self.progress = first.progress
        self.first = first

    def on_finish(self, stage: FinishedStage) -> None:
        self.first.on_finish(stage)


#: Set around a flow call by who wants to follow it.
OBSERVER: ContextVar[Observer | None] = ContextVar("OBSERVER", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Flows that the block calls are told to this observer."""
    token = OBSERVER.set(observer)
    try:
        yield
    finally:
        OBSERVER.reset(token)


class Pipeline:
    """A recipe and its targets, validated, and the MLflow run that records them."""

    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        targets: Sequence[Target],
        tracker: Tracker,
        observer: Observer,
        *,
        skipped: Sequence[TargetOutcome] = (),
        parent: str = "",
        fallback: str = "",
    ) -> None:
        self.recipe = recipe
        self.path = path
        self.targets = tuple(targets)
        #: Those that were asked for and are not run on.
        self.skipped = tuple(skipped)
        #: Of a fallback: the run that missed a gate, and its name in plan_b.
        self.parent = parent
        self.fallback = fallback
        self.tracker = tracker
        self.observer = observer
        self.context = make_context(recipe, path, observer)
        self.run_id = ""
        #: Lines above the stage table in the run's description.
        self.notes: list[str] = []

    def start(self) -> None:
        """Starts the MLflow run. Until here nothing has been written anywhere, and from here the run wants its end."""
        host = {"host.threads": self.context.threads, "host.device": self.context.device}
        tags = {"target": ", ".join(target.name for target in self.targets)}
        self.run_id = self._start_run(flat_params(self.recipe) | host, tags)

    def prepare(self) -> None:
        self.observer.on_start(self.run_id)
        end_zombies(self.tracker)
        self.context.index = MlflowStageIndex(self.tracker, self.context.store, run_id=self.run_id)
        self.tracker.log_text(self.run_id, "recipe.yaml", yaml_of(self.recipe))
        self.tracker.log_json(self.run_id, "environment.json", environment.describe_environment())

    def _start_run(self, params: dict[str, Any], tags: dict[str, str]) -> str:
        if self.parent:
            tags |= {"fallback": self.fallback}
            name = f"plan B {self.fallback}"
            return self.tracker.start_child(self.parent, name, params, tags, kind="fallback")
        if flow_run_id := flow_run.get_id():
            tags |= {FLOW_RUN_TAG: flow_run_id}
        name = f"{self.recipe.name} {datetime.now():%Y-%m-%d %H:%M:%S}"
        return self.tracker.start_run(self.recipe.name, params, tags, run_name=name)

    @property
    def checkpoint(self) -> Path | None:
        """The user's checkpoint file, relative to the recipe."""
        given = self.recipe.workload.checkpoint
        return self.path.parent / given if given else None

    @property
    def stream_source(self) -> Path | None:
        """The user's video or folder of images; None for frames of the evaluation data."""
        return stream_source(self.recipe, self.path)

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.recipe.variants if variant.name == name)

    def variants(self, stage: Stage) -> list[Variant]:
        return [variant for variant in self.recipe.variants if variant.stage is stage]

    def keep(self, stage: str, output: StageOutput, kind: type[H]) -> H:
        """Logs a stage's files and figures to the run, and returns its handle for the next stage."""
        assert isinstance(output.handle, kind)
        folder, _, name = stage.rpartition("/")
        files: dict[str, Handle] = {f"{folder or name}/{f}": handle for f, handle in output.files.items()}
        if output.handle not in files.values():
            files[f"{folder or name}/{name}{output.handle.suffix}"] = output.handle
        self.log_files(self.run_id, files)
        figures = {f"{stage.replace('/', '.')}.{metric}": value for metric, value in output.metrics.items()}
        self.tracker.log_metrics(self.run_id, figures)
        self.notes += [f"{stage}: {note}" for note in output.notes]
        return output.handle

    def log_files(self, run_id: str, files: Mapping[str, Handle]) -> None:
        opened = {path: (handle, self.context.store.open(handle)) for path, handle in files.items()}
        self.tracker.log_files(run_id, opened)


def make_context(recipe: Recipe, path: Path, observer: Observer) -> StageContext:
    """What the stages of this recipe use. Raises ConfigError for a workload or a gate that cannot be."""
    workload = load_workload(recipe.workload, search_path=[Path.cwd(), path.parent])
    known = metric_names(workload.metrics)
    check_stream(recipe.benchmark.stream, stream_source(recipe, path), workload)
    if recipe.cascade:
        classifier, beside = classifier_recipe(recipe, path)
        check_cascade(workload, load_workload(classifier.workload, search_path=[Path.cwd(), beside.parent]))
    check_gate_metrics(recipe.gates, known, [variant.name for variant in recipe.variants])
    return StageContext(
        workload,
        Store(),
        workload_config=recipe.workload,
        workload_digest=workload_digest(workload, recipe.workload),
        seed=recipe.seed,
        threads=recipe.threads,
        progress=observer.progress,
        on_finish=observer.on_finish,
    )


def classifier_recipe(recipe: Recipe, path: Path) -> tuple[Recipe, Path]:
    """The recipe of a cascade's classifier, for the same variants and targets, and its file."""
    assert recipe.cascade is not None
    found, beside = load_recipe(recipe.cascade.classifier, near=path)
    shared = {"variants": recipe.variants, "targets": recipe.targets, "gates": (), "cascade": None}
    return found.model_copy(update={"name": f"{recipe.name}-classifier", **shared}), beside


def stream_source(recipe: Recipe, path: Path) -> Path | None:
    given = recipe.benchmark.stream.source if recipe.benchmark.stream else None
    return path.parent / given if given else None


@contextmanager
def open_pipeline(
    recipe_name: str,
    target_names: Sequence[str] | None,
    overrides: Sequence[str],
    busy_timeout_s: float | None = None,
) -> Iterator[Pipeline]:
    """Validates everything, starts the MLflow run, and ends it as FINISHED, FAILED or KILLED."""
    recipe, path = load_recipe(recipe_name, overrides)
    targets = load_targets(target_names or recipe.targets, near=path)
    if busy_timeout_s is not None:
        targets = [target.model_copy(update={"busy_timeout_s": busy_timeout_s}) for target in targets]
    tracker = Tracker()
    fit, skipped = without_quarantined(tracker, targets)
    for one in skipped:
        logger.warning("%s", outcome_line(one))
    opened = Pipeline(recipe, path, fit, tracker, OBSERVER.get() or Observer(), skipped=skipped)
    with recording(opened) as pipeline:
        yield pipeline


@contextmanager
def recording(pipeline: Pipeline) -> Iterator[Pipeline]:
    """The pipeline's MLflow run, for as long as the block lasts."""
    pipeline.start()
    status: Status = "KILLED"
    try:
        pipeline.prepare()
        yield pipeline
        status = "FINISHED"
    except Exception as exc:
        status = "FAILED"
        pipeline.tracker.set_tags(pipeline.run_id, {"error": f"{type(exc).__name__}: {exc}"})
        raise
    finally:
        pipeline.tracker.finish(pipeline.run_id, status)
        pipeline.tracker.replay(wait_s=0.0 if status == "KILLED" else HANDOVER_S)


def yaml_of(model: BaseModel) -> str:
    return yaml.safe_dump(model.model_dump(mode="json", exclude_none=True), sort_keys=False)
