"""Lower: the exported model as an engine wants it, with the variant's precision inside the file.

An int8 model gets the Q/DQ of its engine (``lowering.for_onnxruntime``, ``lowering.for_tensorrt``), fp16 and bf16
models have their tensors converted (``lowering.float_types``). A float32 model suits every engine and passes
unchanged, and so does one that TensorRT's own calibrator quantizes on the target. For int8-dynamic ONNX Runtime's own
tool quantizes the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import onnx
from prefect import task
from prefect.cache_policies import NO_CACHE

from jetway.configs.schema import Backend, Precision, QatConfig, Section, TensorRtConfig
from jetway.tasks.artifacts import OnnxModel, StageOutput
from jetway.tasks.calibration import calibration_batches
from jetway.tasks.lowering.dynamic import quantize_dynamically
from jetway.tasks.lowering.float_types import FloatTypes
from jetway.tasks.lowering.for_onnxruntime import lower_for_onnxruntime
from jetway.tasks.lowering.for_tensorrt import convert_all, lower_for_tensorrt
from jetway.tasks.onnx_graph import Array, Graph
from jetway.tasks.stage import StageContext, run_stage

logger = logging.getLogger("jetway")

#: Raised when a pass gives another graph for the same input.
REVISION = 6
UNCHANGED = (Precision.FP32, Precision.INT8_CALIBRATED)


class LowerSection(Section):
    """What lowering depends on besides the model."""

    backend: Backend
    precision: Precision
    calibration_samples: int
    calibration_set: str
    qat_revision: int
    tensorrt: dict[str, Any]
    revision: int = REVISION


def lower_onnx(
    context: StageContext,
    model: OnnxModel,
    backend: Backend,
    precision: Precision,
    config: QatConfig,
    tensorrt: TensorRtConfig,
) -> StageOutput:
    """The model for an engine. Its metadata says its ``precision``, the engine that it was ``lowered_for``, and
    what the pass did, such as ``float_islands`` or ``kept_in_fp32``: layers left out, with the reason.

    Raises QuantizationError when there are no calibration data, ExportError for Q/DQ of unknown form, ConfigError
    for a ``tensorrt.mixed`` pattern that matches nothing.
    """
    facts: dict[str, Any] = {"precision": str(precision)}
    if precision in UNCHANGED:
        return StageOutput(handle=model.model_copy(update={"metadata": model.metadata | facts}))
    feeds = calibration_feeds(context, config.calibration_samples, config.calibration_set)
    graph = Graph.load(context.store.open(model))
    if backend.takes_tensorrt_onnx:
        graph, more = _for_tensorrt(graph, precision, tensorrt, feeds, context.threads)
    elif precision is Precision.INT8_DYNAMIC:
        graph, more = quantize_dynamically(graph), {}
    elif precision.has_quantizers:
        graph, more = _for_onnxruntime(graph, feeds, context.threads, trained=precision is Precision.INT8_QAT)
    else:
        graph, types = convert_all(graph, precision, feeds, threads=context.threads)
        more = _told(types, precision)
    facts |= {"lowered_for": backend.name, "opset": graph.opsets[""], **more}
    return StageOutput(handle=_save(context, model, graph, facts))


def lower_section(
    backend: Backend, precision: Precision, config: QatConfig, tensorrt: TensorRtConfig
) -> LowerSection:
    used = {"mixed", "int8_rest", "quantize_residuals"} if backend.takes_tensorrt_onnx else set()
    return LowerSection(
        backend=backend,
        precision=precision,
        calibration_samples=config.calibration_samples,
        calibration_set=config.calibration_set,
        qat_revision=config.revision,
        tensorrt=tensorrt.model_dump(mode="json", include=used),
    )


def calibration_feeds(context: StageContext, samples: int, name: str) -> Iterator[dict[str, Array]]:
    for inputs in calibration_batches(context.workload, samples, name):
        yield {name: tensor.numpy() for name, tensor in inputs.items()}


@task(name="lower", cache_policy=NO_CACHE, persist_result=False)
def lower(
    context: StageContext,
    model: OnnxModel,
    backend: Backend,
    precision: Precision,
    config: QatConfig,
    tensorrt: TensorRtConfig,
) -> StageOutput:
    return run_stage(
        context,
        "lower",
        lambda ctx: lower_onnx(ctx, model, backend, precision, config, tensorrt),
        inputs=[model],
        section=lower_section(backend, precision, config, tensorrt),
    )


def _for_onnxruntime(
    graph: Graph, feeds: Iterator[dict[str, Array]], threads: int, *, trained: bool
) -> tuple[Graph, dict[str, Any]]:
    lowered = lower_for_onnxruntime(graph, feeds, threads=threads, trained=trained)
    return lowered.graph, {
        "integer_macs_ratio": lowered.integer_macs_ratio,
        "float_islands": [island.to_json() for island in lowered.islands],
    }


def _for_tensorrt(
    graph: Graph,
    precision: Precision,
    config: TensorRtConfig,
    feeds: Iterator[dict[str, Array]],
    threads: int,
) -> tuple[Graph, dict[str, Any]]:
    lowered = lower_for_tensorrt(graph, precision, config, feeds, threads=threads)
    facts = _told(lowered.types, precision)
    if precision.has_quantizers:
        facts |= {
            "quantized_residuals": list(lowered.quantized_residuals),
            "released_layers": list(lowered.released),
        }
    return lowered.graph, facts


def _told(types: FloatTypes, precision: Precision) -> dict[str, Any]:
    """The conversion's report for the metadata; what a reader should know goes to the log too."""
    for node in types.kept:
        logger.warning("%s: %s stays in fp32: %s", precision, node.name, node.reason)
    for name, magnitude in types.clipped.items():
        logger.warning("%s: the constant %s reaches %.3g and was clipped", precision, name, magnitude)
    return types.to_json()


def _save(context: StageContext, model: OnnxModel, graph: Graph, facts: dict[str, Any]) -> OnnxModel:
    proto = graph.to_model()
    onnx.checker.check_model(proto)
    with context.store.scratch() as folder:
        path = folder / "lowered.onnx"
        path.write_bytes(proto.SerializeToString(deterministic=True))
        return context.store.add(OnnxModel, path, parents=(model.sha256,), metadata=model.metadata | facts)
