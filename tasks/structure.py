"""The structure record: what must change in a fresh network so that pruned weights fit it.

A record is JSON, without code and without pickle:

    {"schema_version": 1,
     "attributes": {"layer1.conv": {"in_channels": 24, "groups": 24}},   plain attributes that differ
     "tensors": {"layer1.conv.weight": [24, 1, 3, 3]},                   tensors whose shape differs
     "identities": ["layer2.1"],                                         modules replaced by nn.Identity
     "removed": ["aux_head"],                                            modules that are gone
     "ties": {"head.weight": "embedding.weight"}}                        shared tensors; null where the same

It holds the result of pruning, not its history, so attributes of the user's own modules (``num_heads``,
``head_dim``) and removed blocks are carried as well as channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from jetway.tasks.errors import ArtifactError, PruningError

SCHEMA_VERSION = 1

Structure = dict[str, Any]
Plain = bool | int | float | str | tuple[Any, ...] | list[Any] | None

# State of nn.Module itself, not of the architecture.
_TRANSIENT = frozenset({"training", "_is_full_backward_hook"})


def describe_structure(fresh: nn.Module, network: nn.Module) -> Structure:
    """Record of how ``network`` differs from ``fresh``, the same architecture as the workload makes it.

    Raises PruningError when a module is new or of another class, which no record can describe.
    """
    before, after = dict(fresh.named_modules()), dict(network.named_modules())
    removed = [name for name in before if name not in after]
    identities = [name for name in after if name in before and _became_identity(before[name], after[name])]
    _check_classes(before, after, identities)
    kept = [name for name in after if name not in identities]
    attributes = {name: _changed_attributes(before[name], after[name]) for name in kept}
    ties = tied_names(network)
    return {
        "schema_version": SCHEMA_VERSION,
        "attributes": {name: changed for name, changed in attributes.items() if changed},
        "tensors": _changed_shapes(fresh, network),
        "identities": _outermost(identities),
        "removed": _outermost([name for name in removed if not _below(name, identities)]),
        "ties": ties if ties != tied_names(fresh) else None,
    }


def apply_structure(network: nn.Module, structure: Structure) -> nn.Module:
    """Changes a fresh network in place to the recorded structure; resized tensors are left uninitialized.

    Raises ArtifactError when the record does not fit the network.
    """
    version = structure.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"The structure record has schema version {version}, this Jetway reads {SCHEMA_VERSION}. "
            "Prune again, or use the Jetway version that wrote it."
        )
    ties = structure["ties"] if structure["ties"] is not None else tied_names(network)
    try:
        for name in structure["identities"]:
            _replace_module(network, name, nn.Identity())
        for name in structure["removed"]:
            _remove_module(network, name)
        for name, attributes in structure["attributes"].items():
            _set_attributes(network.get_submodule(name), attributes)
        for name, shape in structure["tensors"].items():
            _resize_tensor(network, name, shape)
        _tie(network, ties)
    except (AttributeError, KeyError, TypeError) as exc:
        raise ArtifactError(
            f"The structure record does not fit the workload's network: {exc}. "
            "The network has changed since it was pruned; prune it again."
        ) from exc
    return network


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, non-persistent ones too, under all their names."""
    return dict(network.named_parameters(remove_duplicate=False)) | dict(
        network.named_buffers(remove_duplicate=False)
    )


def tied_names(network: nn.Module) -> dict[str, str]:
    """Each name of a shared parameter or buffer but the first, with that first name."""
    first: dict[int, str] = {}
    ties = {}
    for name, tensor in named_tensors(network).items():
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            ties[name] = owner
    return ties


def _became_identity(before: nn.Module, after: nn.Module) -> bool:
    return type(after) is nn.Identity and type(before) is not nn.Identity


def _check_classes(before: dict[str, nn.Module], after: dict[str, nn.Module], identities: list[str]) -> None:
    for name, module in after.items():
        if name not in before:
            raise PruningError(
                f"Module {name!r} is not in the network that the workload makes, so it cannot be saved. "
                "Change modules in place, or replace whole blocks by nn.Identity."
            )
        if type(module) is not type(before[name]) and name not in identities:
            raise PruningError(
                f"Module {name!r} became a {type(module).__name__}, it was a {type(before[name]).__name__}. "
                "Only nn.Identity may take a module's place."
            )


def _changed_attributes(before: nn.Module, after: nn.Module) -> dict[str, Plain]:
    """Plain attributes that differ. A private one that a fresh module lacks was left by a call: transformers notes
    so that it has hooked a module, which the rebuilt one is not."""
    old, new = vars(before), vars(after)
    return {
        key: value
        for key, value in new.items()
        if key not in _TRANSIENT
        and _is_plain(value)
        and (_differs(old[key], value) if key in old else not key.startswith("_"))
    }


def _differs(old: Any, new: Plain) -> bool:
    return type(old) is not type(new) or old != new


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or type(value) in (bool, int, str) or isinstance(value, torch.Size)


def _changed_shapes(fresh: nn.Module, network: nn.Module) -> dict[str, list[int]]:
    before = {name: tensor.shape for name, tensor in named_tensors(fresh).items()}
    after = named_tensors(network)
    return {name: list(t.shape) for name, t in after.items() if before.get(name) != t.shape}


def _below(name: str, ancestors: list[str]) -> bool:
    return any(name.startswith(f"{ancestor}.") for ancestor in ancestors)


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not _below(name, names)]


def _parent(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return network.get_submodule(owner), leaf


def _replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, leaf = _parent(network, name)
    if leaf not in parent._modules:
        raise KeyError(name)
    parent._modules[leaf] = module


def _remove_module(network: nn.Module, name: str) -> None:
    """Deletes a container's item; an attribute becomes None, so that ``if self.aux`` works."""
    parent, leaf = _parent(network, name)
    if isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        del parent._modules[leaf]
    else:
        setattr(parent, leaf, None)


def _set_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    for key, value in attributes.items():
        setattr(module, key, _like(getattr(module, key, value), value))


def _like(old: Any, value: Any) -> Any:
    """JSON has no tuples: gives the value the type that the fresh attribute has."""
    return type(old)(value) if isinstance(value, list) and isinstance(old, tuple) else value


def _resize_tensor(network: nn.Module, name: str, shape: list[int]) -> None:
    module, leaf = _parent(network, name)
    if leaf in module._parameters:
        old = module._parameters[leaf]
        requires_grad = old is None or old.requires_grad
        dtype = torch.get_default_dtype() if old is None else old.dtype
        module._parameters[leaf] = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad)
    else:
        buffer = module._buffers.get(leaf)
        if leaf not in module._buffers:
            module.register_buffer(leaf, None, persistent=False)
        module._buffers[leaf] = torch.empty(shape, dtype=None if buffer is None else buffer.dtype)


def _tie(network: nn.Module, ties: dict[str, str]) -> None:
    """Shares what ``ties`` shares, and gives what is shared besides a tensor of its own."""
    for name in tied_names(network).keys() - ties.keys():
        module, leaf = _parent(network, name)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(named_tensors(network)[name].detach().clone())
        else:
            module._buffers[leaf] = named_tensors(network)[name].clone()
    for name, owner in ties.items():
        module, leaf = _parent(network, name)
        source, source_leaf = _parent(network, owner)
        if leaf in module._parameters:
            module._parameters[leaf] = source._parameters[source_leaf]
        else:
            module._buffers[leaf] = source._buffers[source_leaf]
