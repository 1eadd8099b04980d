"""A finished run as MLflow keeps it: its rows, and what the child run of each row holds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jetway.configs.load import load_recipe
from jetway.configs.schema import Recipe
from jetway.flows.pipeline import Observer, make_context
from jetway.flows.record import RunResult
from jetway.flows.show import find_result
from jetway.tasks.artifacts import Engine, OnnxModel
from jetway.tasks.deployment import ENGINE_PATH, MODEL_PATH
from jetway.tasks.errors import WorkloadError
from jetway.tasks.paired_scores import Scores
from jetway.tasks.results import VariantResult
from jetway.tasks.sources import describe_error
from jetway.tasks.stage import StageContext
from jetway.tasks.tracking.tracker import Tracker


class StoredRun:
    """Found by its id, the start of one, its name, or ``latest``. Raises TrackingError where there is none.

    ``path`` is the recipe's file where that is known: a workload may lie beside it.
    """

    def __init__(self, tracker: Tracker, id_or_prefix: str, path: Path | None = None) -> None:
        self.record, document = find_result(tracker, id_or_prefix)
        self.result = RunResult.model_validate(document)
        self.tracker = tracker
        self.path = path or Path.cwd() / "recipe.yaml"

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def title(self) -> str:
        return f"{self.run_id[:8]} ({self.record.name})"

    @cached_property
    def recipe(self) -> Recipe:
        """As it ran, overrides included."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.tracker.load_file(self.run_id, "recipe.yaml", Path(folder))
            return load_recipe(str(path))[0]

    @cached_property
    def context(self) -> StageContext:
        """What stages on its engines use, with the workload as its code is today.

        Raises ConfigError when that cannot be imported from here.
        """
        return make_context(self.recipe, self.path, Observer())

    def summarize(self, records: Sequence[Any]) -> Mapping[str, float]:
        """By the workload's code as it is today. Raises ConfigError or WorkloadError when that cannot be."""
        workload = self.context.workload
        try:
            return workload.summarize(records)
        except Exception as exc:
            raise WorkloadError(
                f"the workload's summarize() fails on records: {describe_error(exc)}"
            ) from exc

    def scores(self, row: VariantResult) -> Scores:
        """The records of a row's engine, and what they were made of."""
        child = self.child(row)
        engine, *inputs = self.tracker.files(child)["records.json"].parents
        return Scores(self.tracker.load_json(child, "records.json"), engine, tuple(inputs))

    def engine(self, row: VariantResult) -> Engine:
        """The engine of a row; its metadata says where it lies on its target."""
        engine = self.tracker.files(self.child(row))[ENGINE_PATH]
        assert isinstance(engine, Engine)
        return engine

    def model(self, row: VariantResult) -> OnnxModel:
        """The ONNX file that a row's engine was built from, brought into the store."""
        model = self.tracker.files(self.child(row))[MODEL_PATH]
        assert isinstance(model, OnnxModel)
        store = self.context.store
        if not store.has(model):
            with store.scratch() as folder:
                found = self.tracker.load_file(self.child(row), MODEL_PATH, folder)
                store.add(OnnxModel, Path(shutil.copyfile(found, folder / "incoming")))
        return model

    def child(self, row: VariantResult) -> str:
        """The run of a variant on a target."""
        return self._children[row.variant, row.target]

    @cached_property
    def _children(self) -> dict[tuple[str, str], str]:
        return {
            (child.tags["variant"], child.tags["target"]): child.run_id
            for child in self.tracker.children(self.run_id)
        }
