"""What a finished run put on a target, from its record in MLflow: the winner, its engine, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetway.configs.schema import Variant
from jetway.tasks.artifacts import Engine, OnnxModel
from jetway.tasks.errors import TrackingError
from jetway.tasks.gates import winner
from jetway.tasks.results import VariantResult
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import PLAN_B_TAG, RunRecord
from jetway.tasks.workload import Record

ENGINE_PATH = f"engine{Engine.suffix}"
MODEL_PATH = f"model{OnnxModel.suffix}"


@dataclass(frozen=True)
class Deployment:
    """The winner of a run on one target, as it was recorded. The engine's metadata says where it lies there."""

    run: RunRecord
    target: str
    row: VariantResult
    engine: Engine
    records: list[Record]
    canary_ms_p50: float | None

    @property
    def variant(self) -> Variant:
        return Variant.model_validate(self.row.variant)

    @property
    def remote_path(self) -> str:
        return str(self.engine.metadata["remote_path"])

    @property
    def is_packaged(self) -> bool:
        return self.run.tags.get(f"package.{self.target}") == self.row.variant

    @property
    def package_path(self) -> str:
        """Of the package, among the run's files."""
        return f"targets/{self.target}/package.zip"

    @property
    def parity_excess(self) -> float | None:
        """Worst error of the ONNX file against PyTorch, as a multiple of what is allowed; None without a record."""
        names = [
            name
            for name in self.run.metrics
            if name.startswith(f"{self.row.variant}.") and name.endswith("verify.parity_excess")
        ]
        return max((self.run.metrics[name] for name in names), default=None)


def latest_run(tracker: Tracker, recipe: str, target: str) -> RunRecord:
    """The newest finished run of a recipe on a target. Raises TrackingError when there is none."""
    for run in tracker.pipeline_runs():
        targets = run.tags.get("target", "").split(", ")
        ended = run.status == "FINISHED" or f"package.{target}" in run.tags
        if ended and run.tags.get("recipe") == recipe and target in targets:
            return run
    raise TrackingError(
        f"No finished run of the recipe {recipe!r} on {target} is recorded, so nothing is deployed there. "
        f"Run it first: jetway run {recipe} --target {target}."
    )


def find_deployment(tracker: Tracker, recipe: str, target: str) -> Deployment:
    """The winner of the newest finished run of the recipe on the target.

    Raises TrackingError without such a run, or when every variant of it failed a gate.
    """
    newest = latest_run(tracker, recipe, target)
    fallback = newest.tags.get(f"{PLAN_B_TAG}.{target}")
    run = tracker.run(fallback) if fallback else newest
    children = {
        child.tags["variant"]: child.run_id
        for child in tracker.children(run.run_id)
        if child.tags.get("target") == target
    }
    rows = [VariantResult.model_validate(tracker.load_json(child, "row.json")) for child in children.values()]
    best = winner(rows)
    if best is None:
        raise TrackingError(
            f"The newest run of {recipe!r} on {target}, {run.run_id[:8]}, deployed nothing: every variant failed a "
            f"gate. Look at it with jetway show {run.run_id[:8]}."
        )
    return _deployment_of(tracker, run, children[best.variant], best)


def _deployment_of(tracker: Tracker, run: RunRecord, child: str, row: VariantResult) -> Deployment:
    engine = tracker.files(child)[ENGINE_PATH]
    assert isinstance(engine, Engine)
    session: dict[str, Any] = tracker.load_json(run.run_id, f"targets/{row.target}/benchmark.json")
    return Deployment(
        run=run,
        target=row.target,
        row=row,
        engine=engine,
        records=tracker.load_json(child, "records.json"),
        canary_ms_p50=session["canary"]["p50_ms"],
    )


def package_file(tracker: Tracker, deployment: Deployment, folder: Path) -> Path:
    """The package's zip file; one that lies on this machine stays in its place."""
    return tracker.load_file(deployment.run.run_id, deployment.package_path, folder)
