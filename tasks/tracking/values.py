"""Names, limits and values of what MLflow keeps for us."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from jetway.tasks.artifacts import AnyHandle, Handle

#: What a pipeline run, or a fallback of it, has below it.
ChildKind = Literal["variant", "fallback"]
Status = Literal["FINISHED", "FAILED", "KILLED"]
Files = Mapping[str, tuple[Handle, Path]]

# Limits of MLflow: of one log_batch call (1,000 entities in all), and of one value.
METRICS_A_BATCH = 800
PARAMS_A_BATCH = 100
TAGS_A_BATCH = 100
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
METRIC_CHARACTERS = 250
_NOT_IN_METRICS = re.compile(r"[^A-Za-z0-9_.\- /]")

KIND_TAG = "jetway.kind"
HOST_TAG = "jetway.host"
BOOT_TAG = "jetway.boot_id"
PROCESS_TAG = "jetway.pid"
#: Tells a run that was made from one that is still to be made.
TOKEN_TAG = "jetway.token"
PARENT_TAG = "mlflow.parentRunId"
#: Which fallbacks passed where; with a target's name behind it, the run of the one that passed there.
PLAN_B_TAG = "plan_b"
NOTE_TAG = "mlflow.note.content"

#: Experiment of the nightly runs, of all recipes.
NIGHTS = "jetway-nightly"

#: Tags of an experiment whose pages show runs and their metrics, not the traces of a language model.
MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}

#: Where a run keeps the handles of its own files, by path.
FILES_PATH = "files.json"
HANDLES: TypeAdapter[dict[str, AnyHandle]] = TypeAdapter(dict[str, AnyHandle])


class RunRecord(BaseModel):
    """A run as MLflow tells it. ``experiment`` is the recipe's name, for a pipeline run and its children."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    name: str
    experiment: str
    status: str
    started_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]


def flat_params(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Fields of nested models as MLflow params: ``{"qat.epochs": 3, "qat.distillation.weight": 0.5}``."""
    flat: dict[str, Any] = {}
    for name, value in section:
        key = f"{prefix}{name}"
        if isinstance(value, BaseModel):
            flat |= flat_params(value, f"{key}.")
        else:
            flat[key] = _plain(value)
    return flat


def short_text(value: Any, limit: int = PARAM_CHARACTERS) -> str:
    """The value as text that MLflow accepts, cut with a note of that when it is too long."""
    text = str(value)
    if len(text) <= limit:
        return text
    mark = f" … [cut: {len(text)} characters]"
    return text[: limit - len(mark)] + mark


def metric_name(name: str) -> str:
    """The name as MLflow accepts it: a sensor may be called anything."""
    return _NOT_IN_METRICS.sub("_", name)[:METRIC_CHARACTERS]


def short_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: short_text(value, TAG_CHARACTERS) for key, value in tags.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return ", ".join(str(_plain(item)) for item in value)
    return getattr(value, "name", value) if isinstance(value, BaseModel) else value
