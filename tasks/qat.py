"""Quantization: PTQ calibrates INT8 ranges, QAT trains on from there at a small learning rate.

They are two stages: PTQ's key has only what calibration uses, so a changed ``qat.epochs`` re-runs QAT alone.
Both report the workload's metrics, so what QAT gains over PTQ shows.
"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import nn

from jetway.configs.schema import QatConfig
from jetway.tasks.artifacts import Checkpoint, StageOutput
from jetway.tasks.checkpoint import checkpoint_record, load_network, save_checkpoint
from jetway.tasks.quantization import (
    calibration_section,
    load_quantized_network,
    quantization_record,
    quantize_network,
)
from jetway.tasks.stage import StageContext, run_stage
from jetway.tasks.training import evaluate, train


def quantize_ptq(context: StageContext, checkpoint: Checkpoint, config: QatConfig) -> StageOutput:
    """The network of a float checkpoint with calibrated quantizers, and the metrics it has so.

    Raises ConfigError for a ``keep_float`` pattern that matches nothing, QuantizationError when the
    calibration data are empty or give ranges that are not finite.
    """
    workload = context.workload
    network = load_network(workload, checkpoint, context.store)
    quantize_network(network, workload, calibration_section(config), device=context.device)
    metrics = evaluate(workload, network.to(context.device), device=context.device)
    return StageOutput(handle=_save(context, network, "ptq", (checkpoint,)), metrics=metrics)


def train_qat(
    context: StageContext, ptq: Checkpoint, config: QatConfig, teacher: Checkpoint | None
) -> StageOutput:
    """The fake-quantized network trained on, with its best weights, and the history of the epochs.

    Ranges stay as calibrated. Epoch 0 of the history is the PTQ network. ``teacher`` is the float baseline,
    used when ``config.distillation`` is set. Raises TrainingError when the loss is not finite.
    """
    workload, store = context.workload, context.store
    teachers = (teacher,) if teacher and config.distillation else ()
    network = load_quantized_network(workload, ptq, store)
    result = train(
        network,
        workload,
        config,
        context=context,
        data=workload.qat_data(),
        teacher=load_network(workload, teachers[0], store) if teachers else None,
        stage="qat",
        structure=checkpoint_record(store.open(ptq)).structure,
    )
    handle = _save(context, network, "qat", (ptq, *teachers))
    history = store.add_json(result.to_json(), parents=(handle.sha256,))
    return StageOutput(handle=handle, files={"qat_history.json": history}, metrics=result.metrics)


@task(name="ptq", cache_policy=NO_CACHE, persist_result=False)
def ptq(context: StageContext, checkpoint: Checkpoint, config: QatConfig) -> StageOutput:
    return run_stage(
        context,
        "ptq",
        lambda ctx: quantize_ptq(ctx, checkpoint, config),
        inputs=[checkpoint],
        section=calibration_section(config),
    )


@task(name="qat", cache_policy=NO_CACHE, persist_result=False)
def qat(context: StageContext, ptq: Checkpoint, config: QatConfig, teacher: Checkpoint | None) -> StageOutput:
    return run_stage(
        context,
        "qat",
        lambda ctx: train_qat(ctx, ptq, config, teacher),
        inputs=[ptq, *([teacher] if teacher and config.distillation else [])],
        section=config,
    )


def _save(
    context: StageContext,
    network: nn.Module,
    step: str,
    parents: tuple[Checkpoint, ...],
) -> Checkpoint:
    source = checkpoint_record(context.store.open(parents[0]))
    return save_checkpoint(
        context.store,
        network,
        structure=source.structure,
        quantization=quantization_record(network),
        parents=tuple(parent.sha256 for parent in parents),
        metadata={"stage": parents[0].metadata.get("stage"), "quantization": step},
    )
