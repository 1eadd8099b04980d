"""Stage ``evaluate``: accuracy of an engine from its outputs on the target, scored by the host's own code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.numpy import load_file

from jetway.configs.schema import EvaluateConfig, Target
from jetway.tasks.artifacts import Engine, Tensors
from jetway.tasks.errors import WorkloadError
from jetway.tasks.measurement import Evaluation
from jetway.tasks.remote import (
    RETRIES,
    RETRY_DELAYS_S,
    is_unreachable,
    pull_file,
    push_handle,
    relay,
    save_inputs,
)
from jetway.tasks.stage import StageContext
from jetway.tasks.target.session import TargetSession, open_target
from jetway.tasks.workload import Inputs, Record, batches

Row = dict[str, NDArray[Any]]

# Inputs in one file: bounds the memory of both sides, and what a lost connection sends again.
FILE_BYTES = 64 * 2**20


def evaluate_engine(
    context: StageContext,
    session: TargetSession,
    engine: Engine,
    config: EvaluateConfig,
    *,
    inputs: Sequence[Tensors] | None = None,
    variant: str = "",
) -> Evaluation:
    """Runs the engine over the evaluation data on the target and scores its outputs.

    ``inputs`` is what ``export_inputs`` gave for the same config, to share it between variants. Raises
    TargetMismatchError for an engine built on another machine, WorkloadError when scoring fails or the inputs
    differ in shape.
    """
    inputs = export_inputs(context, config) if inputs is None else inputs
    stage = stage_name(variant, session.target.name)
    request = {
        "engine": {"path": engine.metadata["remote_path"], "sha256": engine.sha256},
        "inputs": [push_handle(context, session, chunk, stage=stage) for chunk in inputs],
    }
    result = session.run_job(
        "evaluate", request, timeout_s=config.timeout_s, on_progress=relay(context.progress, stage)
    )
    records = _score_all(context, session, result["outputs"], stage=stage)
    return Evaluation(
        target=session.target.name,
        metrics=context.workload.summarize(records),
        samples=len(records),
        seconds=result["seconds"],
        records=context.store.add_json(records, parents=(engine.sha256, *(chunk.sha256 for chunk in inputs))),
    )


def stage_name(variant: str, target: str) -> str:
    return f"evaluate {variant} on {target}".replace("  ", " ")


def export_inputs(context: StageContext, config: EvaluateConfig) -> list[Tensors]:
    """The evaluation inputs as files in the store, samples along the first dimension, in their own order.

    Raises WorkloadError when samples differ in shape.
    """
    return [save_inputs(context, chunk) for chunk in _chunks(context, config)]


def _chunks(context: StageContext, config: EvaluateConfig) -> Iterator[Inputs]:
    pending: list[Inputs] = []
    shapes: dict[str, torch.Size] = {}
    size_bytes = 0
    data = context.workload.evaluation_data()
    for inputs, _ in batches(context.workload, data, 1, limit=config.samples):
        for name, tensor in inputs.items():
            _check_shape(name, shapes.setdefault(name, tensor.shape), tensor.shape)
        pending.append(inputs)
        size_bytes += sum(tensor.nbytes for tensor in inputs.values())
        if size_bytes >= FILE_BYTES:
            yield _concatenate(pending)
            pending, size_bytes = [], 0
    if pending:
        yield _concatenate(pending)


def _check_shape(name: str, expected: torch.Size, shape: torch.Size) -> None:
    if shape != expected:
        raise WorkloadError(
            f"evaluation_data() of the workload gives input {name!r} as {list(expected)} in one sample and "
            f"{list(shape)} in another, batch dimension included, but an engine takes one shape. Pad or crop "
            "the samples to the same shape in the data set."
        )


def _concatenate(samples: Sequence[Inputs]) -> Inputs:
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def _score_all(
    context: StageContext, session: TargetSession, outputs: Sequence[Mapping[str, str]], *, stage: str
) -> list[Record]:
    """One record a sample. Outputs are pulled and scored file by file, and not kept."""
    data = context.workload.evaluation_data()
    records: list[Record] = []
    for remote in outputs:
        with context.store.scratch() as folder:
            path = folder / "outputs.safetensors"
            pull_file(context, session, remote["path"], path, sha256=remote["sha256"], stage=stage)
            for row in read_rows(path):
                records.append(_score(context, row, data[len(records)][1]))
    return records


def _score(context: StageContext, outputs: Row, target: Any) -> Record:
    try:
        return context.workload.score_sample(outputs, target)
    except Exception as exc:
        shapes = {name: list(array.shape) for name, array in outputs.items()}
        raise WorkloadError(
            f"score_sample of the workload fails on the engine's outputs {shapes}: {type(exc).__name__}: "
            f"{exc}. Outputs come without their batch dimension."
        ) from exc


def read_rows(path: Path) -> Iterator[Row]:
    """The outputs of each sample, without batch dimension, from a file whose arrays are ``NAME.START``."""
    arrays = load_file(path)
    parts: dict[int, Row] = {}
    for key, array in arrays.items():
        name, _, start = key.rpartition(".")
        parts.setdefault(int(start), {})[name] = _as_scored(array)
    for _, part in sorted(parts.items()):
        for row in range(len(next(iter(part.values())))):
            yield {name: array[row] for name, array in part.items()}


def _as_scored(array: NDArray[Any]) -> NDArray[Any]:
    """Half precision is scored in single precision, as on the host."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


@task(
    name="evaluate",
    task_run_name="evaluate {variant} on {target.name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_condition_fn=is_unreachable,
)
def evaluate(
    context: StageContext, target: Target, engine: Engine, config: EvaluateConfig, *, variant: str
) -> Evaluation:
    with context.timed(stage_name(variant, target.name)), open_target(target) as session:
        return evaluate_engine(context, session, engine, config, variant=variant)
