"""The HTML report of a finished run: ``report.html`` among its artifacts, and ``jetway report``."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from jetway.configs.schema import Recipe
from jetway.flows.record import REPORT_PATH, RESULT_PATH, RunResult
from jetway.flows.show import find_result
from jetway.tasks.artifacts import Handle
from jetway.tasks.cascade_result import CascadeResult
from jetway.tasks.errors import ConfigError, TrackingUnreachableError
from jetway.tasks.measurement import NS_PER_MS, BenchmarkResult, read_samples
from jetway.tasks.report.material import CalibrationMaterial, Lineage, RunMaterial, TargetMaterial
from jetway.tasks.report.run_page import report_html
from jetway.tasks.results import without_result
from jetway.tasks.statistics import Floats
from jetway.tasks.stream_result import StreamResult
from jetway.tasks.target_info import TargetInfo
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import RunRecord

logger = logging.getLogger("jetway")

#: Keys of a recipe that stand elsewhere in the report.
TOLD_ELSEWHERE = ("schema_version", "name", "description", "variants", "gates", "targets", "plan_b")

Model = TypeVar("Model", bound=BaseModel)


def write_report(id_or_prefix: str, output: Path | None = None) -> Path:
    """Writes the report of a finished run, of what MLflow holds now; ``latest`` is the newest that has a result.

    Raises TrackingError when there is no such run, or it ended before it had a stage table, and ConfigError for
    an ``output`` that cannot be a file.
    """
    if output:
        check_output(output, "--output")
    tracker = Tracker()
    run, document = find_result(tracker, id_or_prefix)
    result = RunResult.model_validate(document)
    path = output or Path(f"jetway-report-{run.run_id[:8]}.html")
    path.write_text(report_html(read_run(tracker, run, result)), encoding="utf-8")
    return path


def check_output(path: Path, option: str) -> None:
    """Raises ConfigError for what cannot be written, before anything is read or measured."""
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: name a file in a folder that is there.")


def log_report(tracker: Tracker, run_id: str) -> None:
    """Adds the report to the artifacts of a run whose result is recorded.

    A page that cannot be drawn is a bug of ours and told as an error, but hours of measuring are no failure for it.
    Nor is an MLflow that is away.
    """
    if not tracker.replay():
        return
    try:
        result = RunResult.model_validate(tracker.load_json(run_id, RESULT_PATH))
        run = read_run(tracker, tracker.run(run_id), result)
    except TrackingUnreachableError:
        logger.warning("run %s has no report yet; once MLflow is back: jetway report", run_id[:8])
        return
    try:
        page = report_html(run)
    except Exception:
        logger.exception("run %s has no report, because its page cannot be drawn", run_id[:8])
        return
    tracker.log_text(run_id, REPORT_PATH, page)


def read_run(tracker: Tracker, run: RunRecord, result: RunResult) -> RunMaterial:
    """A finished run from its record and its result. What an older run did not keep is left out."""
    with tempfile.TemporaryDirectory() as folder:
        return _Reader(tracker, run, Path(folder)).run_material(result)


class _Reader:
    """Reads one run's record; ``folder`` takes what is not on this machine."""

    def __init__(self, tracker: Tracker, run: RunRecord, folder: Path) -> None:
        self.tracker, self.run, self.folder = tracker, run, folder

    def run_material(self, result: RunResult) -> RunMaterial:
        recipe = yaml.safe_load(self.path("recipe.yaml").read_text())
        targets = dict.fromkeys(row.target for row in result.rows)
        return RunMaterial(
            run_id=self.run.run_id,
            name=self.run.name,
            recipe=self.run.experiment,
            description=recipe.get("description", ""),
            started=datetime.fromtimestamp(self.run.started_ms / 1000, UTC),
            rows=result.rows,
            metrics=result.task_metrics,
            targets={name: self.target_material(name) for name in targets},
            settings=settings_of(recipe),
            environment=self.tracker.load_json(self.run.run_id, "environment.json"),
            lineage=[self.lineage(child) for child in self.tracker.children(self.run.run_id)],
            calibration=[self.calibration_set(name) for name in self.files_in("calibration")],
            ladder=result.ladder,
            without_result=without_result(result.targets),
        )

    def files_in(self, folder: str) -> list[str]:
        paths = self.tracker.files(self.run.run_id)
        return [p for p in paths if p.startswith(f"{folder}/") and self.tracker.has_file(self.run.run_id, p)]

    def calibration_set(self, path: str) -> CalibrationMaterial:
        told = self.tracker.load_json(self.run.run_id, path)
        return CalibrationMaterial(
            name=told["set"],
            sha256=told["sha256"],
            samples=told["samples"],
            scenes=told["scenes"],
            only_in_evaluation=told["scenes_only_in_evaluation"],
        )

    def target_material(self, target: str) -> TargetMaterial:
        folder = f"targets/{target}"
        benchmark = self.model(f"{folder}/benchmark.json", BenchmarkResult)
        return TargetMaterial(
            info=self.model(f"{folder}/target.json", TargetInfo),
            benchmark=benchmark,
            latencies_ms=self.latencies_ms(f"{folder}/samples.safetensors", benchmark),
            stream=self.model(f"{folder}/stream.json", StreamResult),
            cascade=self.model(f"{folder}/cascade.json", CascadeResult),
        )

    def latencies_ms(self, path: str, benchmark: BenchmarkResult | None) -> dict[str, Floats]:
        """Every counted query by variant; nothing where ``jetway clean`` has removed the samples."""
        if benchmark is None or not self.tracker.has_file(self.run.run_id, path):
            return {}
        samples = read_samples(self.path(path), list(benchmark.variants), benchmark.excluded_rounds)
        return {name: latencies / NS_PER_MS for name, (latencies, _) in samples.items()}

    def model(self, path: str, kind: type[Model]) -> Model | None:
        """A document of the run; None where it has none, or another version of Jetway wrote it otherwise."""
        if not self.tracker.has_file(self.run.run_id, path):
            return None
        try:
            return kind.model_validate(self.tracker.load_json(self.run.run_id, path))
        except ValidationError:
            return None

    def path(self, path: str) -> Path:
        return self.tracker.load_file(self.run.run_id, path, self.folder)

    def lineage(self, child: RunRecord) -> Lineage:
        files = self.tracker.files(child.run_id)
        return Lineage(
            variant=child.tags["variant"],
            target=child.tags["target"],
            files=tuple((kind, handle.sha256) for kind, handle in _origins(files).items()),
            engine_version=_engine_version(files),
        )


def settings_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe sets that is not a default, by dotted key; all of it where today's schema does not know it."""
    try:
        told = Recipe.model_validate(recipe).model_dump(mode="json", exclude_defaults=True)
    except ValidationError:
        told = dict(recipe)
    return dict(_flat({key: value for key, value in told.items() if key not in TOLD_ELSEWHERE}))


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) and value else [(name, _plain(value))]
    return found


def _plain(value: Any) -> str:
    """A section that is there and sets nothing stands for its defaults."""
    if value == {}:
        return "as by default"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _origins(files: Mapping[str, Handle]) -> dict[str, Handle]:
    """The files of a variant's run by what they are, in the order in which one was made from the other."""
    stems = {"checkpoint": "weights", "model": "ONNX", "engine": "engine", "records": "answers"}
    by_stem = {path.partition(".")[0]: handle for path, handle in files.items()}
    return {name: by_stem[stem] for stem, name in stems.items() if stem in by_stem}


def _engine_version(files: Mapping[str, Handle]) -> str:
    engine = _origins(files).get("engine")
    platform = engine.metadata.get("platform", {}) if engine else {}
    return f"{platform.get('engine', '')} {platform.get('engine_version', '')}".strip()
