"""SmoothQuant: moves what is hard to quantize from the inputs of linear layers into their weights.

Channel by channel, the LayerNorm before gives less and the weights multiply more, by the same factor, so that the
float network computes what it did (Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models"). It applies to linear layers that take what a LayerNorm gives, directly
or through views, rolls and windows; every pair is proved by the network's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jetway.tasks.workload import Inputs, Outputs, call_network

#: Share of the difficulty that moves from inputs to weights; the authors' default.
STRENGTH = 0.5

NOTHING_TO_SMOOTH = (
    "smoothquant finds nothing to smooth: no linear layer of this network takes what a LayerNorm with weights gives. "
    "Choose another qat.calibration: mse, entropy, percentile or max."
)

_LEAST = 1e-5


@dataclass
class _Pair:
    """A LayerNorm, and the linear layers that take the same tensor behind it."""

    norm: nn.LayerNorm
    source: Tensor
    layers: dict[str, nn.Linear]
    #: Largest magnitude of each input channel.
    largest: Tensor = field(default_factory=lambda: torch.zeros(()))


@torch.no_grad()
def smooth_linear_layers(
    network: nn.Module, batches: Sequence[Inputs], output_names: Sequence[str], strength: float = STRENGTH
) -> list[str]:
    """Smooths in place, and names the linear layers that it could; none where no LayerNorm leads to one."""
    network.eval()
    before = call_network(network, batches[0], output_names)
    pairs = _find_pairs(network, batches[0], output_names)
    _observe(network, pairs, batches, output_names)
    smoothed: list[str] = []
    for pair in pairs:
        factors = _factors(pair, strength)
        _scale(pair, factors)
        if _agree(before, call_network(network, batches[0], output_names)):
            smoothed += pair.layers
        else:
            _scale(pair, 1 / factors)
    return smoothed


@torch.no_grad()
def has_smoothable_layers(network: nn.Module, inputs: Inputs, output_names: Sequence[str]) -> bool:
    """Whether a LayerNorm leads to a linear layer; what it would change is not tried."""
    return bool(_find_pairs(network.eval(), inputs, output_names))


def _find_pairs(network: nn.Module, inputs: Inputs, output_names: Sequence[str]) -> list[_Pair]:
    """Behind each LayerNorm the next linear layer of its width, and all that are given the very same tensor."""
    pairs: list[_Pair] = []
    waiting: list[nn.LayerNorm] = []

    def watch(name: str, module: nn.Module, source: Tensor) -> None:
        if isinstance(module, nn.LayerNorm):
            waiting[:] = [module] if module.elementwise_affine and len(module.normalized_shape) == 1 else []
        elif isinstance(module, nn.Linear):
            if waiting and waiting[0].normalized_shape[0] == module.in_features:
                pairs.append(_Pair(waiting.pop(), source, {name: module}))
            elif pairs and pairs[-1].source is source:
                pairs[-1].layers[name] = module

    hooks = [
        module.register_forward_pre_hook(lambda m, given, name=name: watch(name, m, given[0]))
        for name, module in network.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.Linear))
    ]
    call_network(network, inputs, output_names)
    for hook in hooks:
        hook.remove()
    return pairs


def _observe(
    network: nn.Module, pairs: Sequence[_Pair], batches: Sequence[Inputs], output_names: Sequence[str]
) -> None:
    def watch(pair: _Pair, source: Tensor) -> None:
        pair.largest = torch.maximum(pair.largest.to(source.device), source.abs().flatten(0, -2).amax(dim=0))

    hooks: list[Any] = [
        next(iter(pair.layers.values())).register_forward_pre_hook(
            lambda _m, given, pair=pair: watch(pair, given[0])
        )
        for pair in pairs
    ]
    for inputs in batches:
        call_network(network, inputs, output_names)
    for hook in hooks:
        hook.remove()


def _factors(pair: _Pair, strength: float) -> Tensor:
    weights = torch.stack([layer.weight.abs().amax(dim=0) for layer in pair.layers.values()]).amax(dim=0)
    factors = pair.largest.clamp_min(_LEAST) ** strength / weights.clamp_min(_LEAST) ** (1 - strength)
    return torch.where(pair.largest > 0, factors.clamp_min(_LEAST), 1.0)


def _scale(pair: _Pair, factors: Tensor) -> None:
    pair.norm.weight.div_(factors)
    if pair.norm.bias is not None:
        pair.norm.bias.div_(factors)
    for layer in pair.layers.values():
        layer.weight.mul_(factors)


def _agree(before: Outputs, after: Outputs) -> bool:
    return all(
        torch.allclose(after[name], output, rtol=1e-3, atol=1e-4 * float(output.abs().max()))
        for name, output in before.items()
        if output.is_floating_point()
    )
