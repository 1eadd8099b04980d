"""Lower: the exported model as the target's engine wants it.

TensorRT takes explicit Q/DQ as it is exported, and a float model suits every engine, so both pass unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

import onnx
from prefect import task
from prefect.cache_policies import NO_CACHE

from jetway.configs.schema import EngineName, Precision, QatConfig, Section
from jetway.tasks.artifacts import OnnxModel, StageOutput
from jetway.tasks.errors import QuantizationError
from jetway.tasks.lowering.for_onnxruntime import lower_for_onnxruntime
from jetway.tasks.onnx_graph import Array, Graph
from jetway.tasks.stage import StageContext, run_stage
from jetway.tasks.workload import Workload

#: Raised when the pass gives another graph for the same input.
REVISION = 1


class LowerSection(Section):
    """What lowering depends on besides the model."""

    engine: EngineName
    calibration_samples: int
    qat_revision: int
    revision: int = REVISION


def lower_onnx(context: StageContext, model: OnnxModel, engine: EngineName, config: QatConfig) -> StageOutput:
    """The model for an engine. For ONNX Runtime an int8 model gets ORT's own Q/DQ, and in its metadata
    ``lowered_for``, ``integer_macs_ratio`` and ``float_islands``: the layers left in float, with the reason.

    Raises QuantizationError when there are no calibration data, ExportError for Q/DQ of unknown form.
    """
    if not needs_lowering(model, engine):
        return StageOutput(handle=model)
    feeds = calibration_feeds(context.workload, config.calibration_samples)
    graph = Graph.load(context.store.open(model))
    lowered = lower_for_onnxruntime(graph, feeds, threads=context.threads)
    with context.store.scratch() as folder:
        path = folder / "lowered.onnx"
        proto = lowered.graph.to_model()
        onnx.checker.check_model(proto)
        path.write_bytes(proto.SerializeToString(deterministic=True))
        facts = {
            "lowered_for": str(engine),
            "integer_macs_ratio": lowered.integer_macs_ratio,
            "float_islands": [island.to_json() for island in lowered.islands],
        }
        handle = context.store.add(OnnxModel, path, parents=(model.sha256,), metadata=model.metadata | facts)
    return StageOutput(handle=handle)


def lower_section(engine: EngineName, config: QatConfig) -> LowerSection:
    samples, revision = config.calibration_samples, config.revision
    return LowerSection(engine=engine, calibration_samples=samples, qat_revision=revision)


def needs_lowering(model: OnnxModel, engine: EngineName) -> bool:
    return engine is EngineName.ONNXRUNTIME and model.metadata.get("precision") != Precision.FP32


def calibration_feeds(workload: Workload, samples: int) -> Iterator[dict[str, Array]]:
    """Calibration inputs in batches of the example inputs' size, the last one filled up from the start."""
    data = workload.calibration_data()
    count = min(samples, len(data))  # type: ignore[arg-type]
    if count == 0:
        raise QuantizationError(
            f"{type(workload).__qualname__}.calibration_data() is empty, and int8 takes its ranges from it. "
            "Return some hundred typical samples that are not evaluation data."
        )
    size = len(next(iter(workload.example_inputs().values())))
    padded = list(islice(cycle(range(count)), -(-count // size) * size))
    for start in range(0, len(padded), size):
        inputs, _ = workload.collate([data[index] for index in padded[start : start + size]])
        yield {name: tensor.numpy() for name, tensor in inputs.items()}


@task(name="lower", cache_policy=NO_CACHE, persist_result=False)
def lower(context: StageContext, model: OnnxModel, engine: EngineName, config: QatConfig) -> StageOutput:
    return run_stage(
        context,
        "lower",
        lambda ctx: lower_onnx(ctx, model, engine, config),
        inputs=[model],
        section=lower_section(engine, config),
    )
