"""Load: the trained baseline, from a checkpoint file or by training it."""

from __future__ import annotations

import pickle
import warnings
from copy import copy
from pathlib import Path
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor, nn

from jetway.configs.schema import StageSection, TrainConfig
from jetway.tasks.artifacts import Checkpoint, StageOutput, file_sha256
from jetway.tasks.checkpoint import (
    CheckpointRecord,
    build_network,
    checkpoint_record,
    load_weights,
    read_tensors,
    save_checkpoint,
)
from jetway.tasks.errors import ArtifactError, ConfigError
from jetway.tasks.stage import StageContext, run_stage
from jetway.tasks.training import evaluate, train
from jetway.tasks.workload import check_training_data, check_workload

STATE_DICT_SUFFIXES = (".pt", ".pth")

NO_BASELINE = (
    "workload.checkpoint is not set and there is no train section: there is no baseline. Name a "
    "checkpoint, or add a train section (an empty one, `train: {}`, trains with its defaults)."
)

_CONVERT = (
    "Where the file was made, with its own code at hand, run: "
    "safetensors.torch.save_file(network.state_dict(), 'weights.safetensors')."
)


def load_baseline(
    context: StageContext, checkpoint: Path | None, train_config: TrainConfig | None
) -> StageOutput:
    """The baseline's checkpoint, with the workload's metrics on its evaluation data.

    ``checkpoint`` is a .safetensors file, or a .pt file that holds nothing but a state dict; without it
    the network is trained. Nothing is ever unpickled that could run code.

    Raises ConfigError when there is neither, ArtifactError when the file is corrupt, pickled, or does not
    fit the workload's network.
    """
    check_workload(context.workload)
    check_training_data(context.workload)
    if checkpoint is not None:
        return _load_file(context, checkpoint)
    if train_config is None:
        raise ConfigError(NO_BASELINE)
    return _train_baseline(context, train_config)


def checkpoint_input(path: Path) -> Checkpoint:
    """Handle of a user's file, so that its content is part of the stage's key.

    Raises ConfigError when there is no such file, or it is of another kind.
    """
    if not path.is_file():
        raise ConfigError(
            f"workload.checkpoint: there is no file {path}. The path is relative to the recipe's folder; "
            "correct it, or leave it out to train the baseline."
        )
    if path.suffix not in (Checkpoint.suffix, *STATE_DICT_SUFFIXES):
        raise ConfigError(
            f"workload.checkpoint: {path.name} is neither {Checkpoint.suffix} nor "
            f"{' nor '.join(STATE_DICT_SUFFIXES)}. {_CONVERT}"
        )
    return Checkpoint(sha256=file_sha256(path), size_bytes=path.stat().st_size)


@task(name="load", cache_policy=NO_CACHE, persist_result=False)
def load(context: StageContext, checkpoint: Path | None, train_config: TrainConfig | None) -> StageOutput:
    return run_stage(
        context,
        "load",
        lambda ctx: load_baseline(ctx, checkpoint, train_config),
        inputs=[checkpoint_input(checkpoint)] if checkpoint else [],
        section=train_config if train_config and not checkpoint else StageSection(),
    )


def _load_file(context: StageContext, path: Path) -> StageOutput:
    source = checkpoint_input(path)
    record = checkpoint_record(path) if path.suffix == Checkpoint.suffix else CheckpointRecord()
    if record.quantization is not None:
        raise ArtifactError(
            f"{path} is quantized. The baseline is a float network: name its checkpoint instead."
        )
    tensors = read_tensors(path) if path.suffix == Checkpoint.suffix else read_state_dict(path)
    network = build_network(context.workload, record.structure)
    load_weights(network, tensors, source=str(path))
    metrics = evaluate(context.workload, network, device=context.device)
    handle = _save(context, network, record, parents=(source.sha256,))
    return StageOutput(handle=handle, metrics=metrics)


def _train_baseline(context: StageContext, config: TrainConfig) -> StageOutput:
    network, workload = context.workload.network(), context.workload
    shown = copy(context)
    shown.progress = lambda _, *step: context.progress("load", *step)
    result = train(network, workload, config, context=shown, data=workload.train_data(), stage="train")
    handle = _save(context, network, CheckpointRecord())
    history = context.store.add_json(result.to_json(), parents=(handle.sha256,))
    return StageOutput(handle=handle, files={"train_history.json": history}, metrics=result.metrics)


def _save(
    context: StageContext, network: nn.Module, record: CheckpointRecord, parents: tuple[str, ...] = ()
) -> Checkpoint:
    return save_checkpoint(
        context.store, network, structure=record.structure, parents=parents, metadata={"stage": "baseline"}
    )


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pt file that holds a state dict and nothing else.

    Raises ArtifactError for anything that only pickle could load, and for a damaged file.
    """
    try:
        with warnings.catch_warnings():
            # It warns of pickle protocols that it can read all the same.
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        raise ArtifactError(
            f"{path} is not a plain state dict, or is damaged ({_first_line(exc)}). "
            f"Jetway never unpickles code. {_CONVERT}"
        ) from exc
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as exc:
        raise ArtifactError(
            f"{path} is damaged ({_first_line(exc)}). Copy it again from where it was saved. {_CONVERT}"
        ) from exc
    return _checked_state_dict(path, value)


def _checked_state_dict(path: Path, value: Any) -> dict[str, Tensor]:
    if isinstance(value, dict) and value and all(isinstance(item, Tensor) for item in value.values()):
        return {str(name): tensor for name, tensor in value.items()}
    found = f"a dict with {sorted(map(str, value))[:6]}" if isinstance(value, dict) else type(value).__name__
    raise ArtifactError(
        f"{path} holds {found}, not a state dict of names and tensors. "
        f"Save network.state_dict() alone. {_CONVERT}"
    )


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().partition("\n")[0][:200] or type(exc).__name__
