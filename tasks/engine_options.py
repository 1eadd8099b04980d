"""What a target's builder is asked for: an engine and its options, from the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jetway.configs.schema import Backend, EngineName, Precision, TensorRtConfig

#: Keys of the section that the ONNX file carries already, and those that come in another form.
_NOT_OPTIONS = {"quantize_residuals", "calibration"}


def engine_options(
    backend: Backend, precision: Precision, config: TensorRtConfig, batches: Sequence[str] = ()
) -> dict[str, Any]:
    """``options`` of a build request. ``batches`` are the calibration batches' paths on the target."""
    if backend.engine is EngineName.ONNXRUNTIME:
        return {"providers": [str(provider) for provider in backend.providers]}
    section = config.model_dump(mode="json", exclude=_NOT_OPTIONS)
    calibration = {"algorithm": config.calibration.algorithm, "batches": list(batches), "cache": None}
    return {
        **section,
        "precision": "int8" if precision.has_quantizers else str(precision),
        "calibration": calibration if precision is Precision.INT8_CALIBRATED else None,
        "dla": section["dla"] if runs_on_dla(precision) else None,
    }


def runs_on_dla(precision: Precision) -> bool:
    """A DLA computes fp16 and int8; the other variants of a recipe stay on the GPU."""
    return precision is Precision.FP16 or precision.is_int8
