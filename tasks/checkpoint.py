"""Checkpoints: one safetensors file with the weights and, in its metadata, what rebuilds the network.

The metadata key ``jetway`` is JSON: ``{"schema_version": 1, "structure": ..., "quantization": ...}``:
the record of ``structure.py`` (null for the workload's own architecture) and that of ``quantization.py``.
A file without the key is a plain state dict of the workload's network. Shared tensors are stored once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jetway.tasks.artifacts import Checkpoint
from jetway.tasks.errors import ArtifactError, WorkloadError
from jetway.tasks.store import Store
from jetway.tasks.structure import Structure, apply_structure, named_tensors, tied_names
from jetway.tasks.workload import Workload

METADATA_KEY = "jetway"

# How many names a message lists before it only counts.
_LISTED = 6


class CheckpointRecord(BaseModel):
    """What a checkpoint file says of the network that its weights fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    structure: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None


def save_checkpoint(
    store: Store,
    network: nn.Module,
    *,
    structure: Structure | None,
    quantization: dict[str, Any] | None = None,
    parents: tuple[str, ...] = (),
    metadata: dict[str, Any] | None = None,
) -> Checkpoint:
    """Writes the network's tensors, non-persistent buffers included, with its records. Returns the handle."""
    record = CheckpointRecord(structure=structure, quantization=quantization)
    with store.scratch() as folder:
        path = folder / "checkpoint.safetensors"
        save_tensors(network_tensors(network), path, record)
        return store.add(Checkpoint, path, parents=parents, metadata=metadata)


def save_tensors(tensors: dict[str, Tensor], path: Path, record: CheckpointRecord) -> None:
    """Writes named tensors and a record as one safetensors file."""
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(copies, path, metadata={METADATA_KEY: json.dumps(record.model_dump(), sort_keys=True)})


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint stores: all but the second names of shared ones."""
    extra = [name for name, value in network.state_dict().items() if not isinstance(value, Tensor)]
    if extra:
        raise WorkloadError(
            f"The network keeps extra state that is not a tensor: {_listed(extra)}. "
            "Make it a buffer or a constructor argument: a checkpoint holds tensors only."
        )
    ties = tied_names(network)
    return {name: tensor for name, tensor in named_tensors(network).items() if name not in ties}


def checkpoint_record(path: Path) -> CheckpointRecord:
    """The records in a checkpoint's own metadata; empty ones for a plain file of weights."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as exc:
        raise _corrupt(path, exc) from exc
    try:
        return CheckpointRecord.model_validate_json(metadata.get(METADATA_KEY, "{}"))
    except ValidationError as exc:
        raise ArtifactError(
            f"{path}: its metadata {METADATA_KEY!r} is not a checkpoint record of this Jetway "
            f"({exc.error_count()} errors). Make the checkpoint again with this version."
        ) from exc


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises ArtifactError when the file is corrupt."""
    try:
        return load_file(path)
    except SafetensorError as exc:
        raise _corrupt(path, exc) from exc


def build_network(workload: Workload, structure: Structure | None) -> nn.Module:
    """A fresh float network of the recorded structure; its weights are still to be loaded."""
    network = workload.network()
    return network if structure is None else apply_structure(network, structure)


def load_network(workload: Workload, checkpoint: Checkpoint, store: Store) -> nn.Module:
    """The float network of a checkpoint, in eval mode, on the CPU.

    Raises ArtifactError when the file is missing, corrupt, quantized, or does not fit the workload's network.
    """
    path = store.open(checkpoint)
    record = checkpoint_record(path)
    if record.quantization is not None:
        raise ArtifactError(
            f"checkpoint {checkpoint.sha256[:12]} is quantized: "
            "load it with quantization.load_quantized_network."
        )
    network = build_network(workload, record.structure)
    load_weights(network, read_tensors(path), source=str(path))
    return network.eval()


def load_weights(network: nn.Module, tensors: dict[str, Tensor], *, source: str) -> None:
    """Copies named tensors into the network, strictly. Raises ArtifactError naming keys that do not fit."""
    ties = tied_names(network)
    tensors = {name: tensors[owner] for name, owner in ties.items() if owner in tensors} | tensors
    own, expected = named_tensors(network), network.state_dict()
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    reshaped = [
        f"{name} {tuple(tensor.shape)} where the network has {tuple(own[name].shape)}"
        for name, tensor in tensors.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if missing or unexpected or reshaped:
        raise ArtifactError(_mismatch(source, missing, unexpected, reshaped))
    network.load_state_dict({name: tensors[name] for name in expected})
    for name in tensors.keys() - expected.keys():
        network.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = tensors[name]


def _mismatch(source: str, missing: list[str], unexpected: list[str], reshaped: list[str]) -> str:
    parts = [
        f"{what}: {_listed(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("other shape", reshaped))
        if names
    ]
    advice = "Save network.state_dict() of the very network that the workload makes"
    prefix = _common_prefix(unexpected)
    if prefix and missing:
        advice += f", or rename its keys: they all start with {prefix!r}"
    return f"{source} does not fit the workload's network. {'; '.join(parts)}. {advice}."


def _common_prefix(names: list[str]) -> str:
    prefixes = {name.partition(".")[0] for name in names}
    return f"{prefixes.pop()}." if len(prefixes) == 1 else ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _corrupt(path: Path, exc: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path} is not a whole safetensors file ({exc}). Copy it again from where it was saved, "
        "or write it with safetensors.torch.save_file(network.state_dict(), path)."
    )
