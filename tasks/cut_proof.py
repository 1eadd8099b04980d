"""Proof of a cut: without some channels, a network must give what it gives when nothing reads them.

Which channels lie where behind joins, splits and views is inferred from one call. Where that is wrong, every shape may
still fit, and other channels than those that were ranked would be gone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch_pruning.ops import OPTYPE

from jetway.tasks.channels import Cut, apply_cuts, checked_outputs
from jetway.tasks.dependencies import Dependencies, UnfollowedError
from jetway.tasks.errors import PruningError
from jetway.tasks.workload import Inputs

REARRANGING = (
    OPTYPE.CONCAT,
    OPTYPE.SPLIT,
    OPTYPE.SLICE,
    OPTYPE.RESHAPE,
    OPTYPE.UNBIND,
    OPTYPE.EXPAND,
)
#: Layers for which it does not matter how many other channels there are.
_APART = (_ConvNd, nn.Linear, _BatchNorm, nn.PReLU)
#: Rounding alone, as a share of the largest output.
_TOLERANCE = 1e-3


def is_proven(
    network: nn.Module, graph: Dependencies, inputs: Inputs, output_names: tuple[str, ...], cut: Cut
) -> bool:
    """Whether the cut network answers noise as the whole one does whose layers read 0 for the channels that go.

    ``graph`` is of the whole network. True without a trial where channels keep their order all the way, and where
    layers look at all channels together, such as a LayerNorm, which changes with their number.
    """
    try:
        group = graph.get_pruning_group(network.get_submodule(cut.root), cut.handler, cut.indices)
        if not (_is_rearranged(group) and _can_be_proven(group)):
            return True
        unread, shorter = copy.deepcopy(network), copy.deepcopy(network)
        _read_as_zero(unread, graph, group)
        apply_cuts(shorter, inputs, output_names, [cut])
        noise = _noise_like(inputs)
        expected, found = (checked_outputs(each.eval(), noise, output_names) for each in (unread, shorter))
    except (PruningError, UnfollowedError):
        return False
    return all(_agree(expected[name], found[name]) for name in output_names)


def _is_rearranged(group: Any) -> bool:
    return any(item.dep.target.type in REARRANGING for item in group)


def _can_be_proven(group: Any) -> bool:
    modules = [item.dep.target.module for item in group]
    layers = [module for module in modules if isinstance(module, nn.Module) and [*module.parameters()]]
    return all(isinstance(layer, _APART) for layer in layers)


@torch.no_grad()
def _read_as_zero(network: nn.Module, graph: Dependencies, group: Any) -> None:
    for item in group:
        layer = item.dep.target.module
        if graph.is_in_channel_pruning_fn(item.dep.handler) and isinstance(layer, (_ConvNd, nn.Linear)):
            _forget(network.get_submodule(graph._module2name[layer]), item.idxs)


def _forget(layer: nn.Module, channels: list[int]) -> None:
    """Sets to 0 what a layer multiplies these channels of its input by."""
    assert isinstance(layer, (_ConvNd, nn.Linear))
    weight = layer.weight
    if isinstance(layer, _ConvTransposeNd):
        weight[channels] = 0.0
        return
    read, made = weight.shape[1], weight.shape[0] // getattr(layer, "groups", 1)
    for channel in channels:
        block, place = divmod(channel, read)
        weight[block * made : (block + 1) * made, place] = 0.0


def _noise_like(inputs: Inputs) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _agree(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    limit = _TOLERANCE * float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(expected.float(), found.float(), rtol=0.0, atol=limit, equal_nan=True)
