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
from jetway.tasks.dependencies import Dependencies, trace_dependencies
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
#: Layers, beside convolutions without groups, for which it does not matter how many other channels there are.
_APART = (nn.Linear, _BatchNorm, nn.PReLU)
#: Rounding alone, as a share of the largest output.
_TOLERANCE = 1e-3


def is_proven(network: nn.Module, inputs: Inputs, output_names: tuple[str, ...], cut: Cut) -> bool:
    """Whether the cut network answers noise as the whole one does whose layers read 0 for the channels that go.

    True without a trial where channels keep their order all the way, and where layers look at all channels together,
    such as a LayerNorm, which changes with their number.
    """
    unread, shorter = copy.deepcopy(network), copy.deepcopy(network)
    graph = trace_dependencies(unread, inputs, output_names)
    group = graph.get_pruning_group(unread.get_submodule(cut.root), cut.handler, cut.indices)
    if not (_is_rearranged(group) and _can_be_proven(group)):
        return True
    _read_as_zero(graph, group)
    noise = _noise_like(inputs)
    try:
        apply_cuts(shorter, inputs, output_names, [cut])
        expected, found = (checked_outputs(each.eval(), noise, output_names) for each in (unread, shorter))
    except PruningError:
        return False
    return all(_agree(expected[name], found[name]) for name in output_names)


def _is_rearranged(group: Any) -> bool:
    return any(item.dep.target.type in REARRANGING for item in group)


def _can_be_proven(group: Any) -> bool:
    modules = [item.dep.target.module for item in group]
    layers = [module for module in modules if isinstance(module, nn.Module) and [*module.parameters()]]
    return all(isinstance(layer, _APART) or _is_plain(layer) for layer in layers)


def _is_plain(layer: nn.Module) -> bool:
    """A convolution without groups, or with one for each channel."""
    return isinstance(layer, _ConvNd) and layer.groups in (1, layer.in_channels, layer.out_channels)


@torch.no_grad()
def _read_as_zero(graph: Dependencies, group: Any) -> None:
    for item in group:
        layer = item.dep.target.module
        reads = graph.is_in_channel_pruning_fn(item.dep.handler)
        if reads and isinstance(layer, (_ConvNd, nn.Linear)) and getattr(layer, "groups", 1) == 1:
            axis = 0 if isinstance(layer, _ConvTransposeNd) else 1
            layer.weight.index_fill_(axis, torch.tensor(item.idxs), 0.0)


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
