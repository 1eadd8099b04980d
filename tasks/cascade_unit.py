"""What a detector and the classifier behind it are told on a target, in a measured session and in a package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jetway.configs.schema import CascadeConfig, StreamConfig
from jetway.tasks.artifacts import Engine, OnnxModel
from jetway.tasks.clip import evaluation_frames, frame_processing_of
from jetway.tasks.stage import StageContext
from jetway.tasks.workload import Workload

SCRIPT = Path(__file__).parent / "package_files/cascade.py"
#: Folder of the classifier's own package in that of the cascade.
CLASSIFIER = "classifier"
SAMPLE_FRAMES = 8


@dataclass(frozen=True)
class Behind:
    """The classifier of a cascade, for the package of its detector."""

    context: StageContext
    engine: Engine
    onnx: OnnxModel
    config: CascadeConfig


def unit_settings(detector: Workload, classifier: Workload, config: CascadeConfig) -> dict[str, Any]:
    """What stands before and behind either engine. Boxes of any class compete, as the classifier names them."""
    declared = frame_processing_of(detector)
    boxes = declared.results.model_copy(
        update={"min_score": config.min_score, "max_iou": config.max_iou, "class_agnostic": True}
    )
    return {
        "detector": declared.model_copy(update={"results": boxes}).model_dump(mode="json"),
        "classifier": frame_processing_of(classifier).model_dump(mode="json"),
        **config.model_dump(include={"margin", "max_objects"}),
    }


def write_unit(context: StageContext, folder: Path, behind: Behind) -> None:
    """The script that runs both engines, its settings, and frames to try it on."""
    settings = unit_settings(context.workload, behind.context.workload, behind.config)
    (folder / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    (folder / "cascade.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    frames = evaluation_frames(context.workload, StreamConfig(clip_frames=SAMPLE_FRAMES))
    np.save(folder / "sample_frames.npy", frames)
