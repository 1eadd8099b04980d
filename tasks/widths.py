"""Widths that modules remember as plain numbers, and use in ``reshape`` and ``view``: ``self.hidden_dim = 768``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

_KEYS = ("hidden_dim", "hidden_size", "embed_dim", "embedding_dim", "d_model", "num_features", "width", "dim")


@dataclass(frozen=True)
class RememberedWidth:
    """An attribute of a module that equals the output channels of layers which are its own children."""

    module: str
    key: str
    layers: tuple[str, ...]


def find_widths(network: nn.Module) -> list[RememberedWidth]:
    """Every such attribute. A module's own weight is no child's, so layers themselves are never meant."""
    return [
        RememberedWidth(name, key, layers)
        for name, module in network.named_modules()
        for key in _KEYS
        if type(value := vars(module).get(key)) is int
        and (layers := tuple(child for child, width in _children(module) if width == value))
    ]


def update_remembered(network: nn.Module, remembered: list[RememberedWidth]) -> None:
    """Sets each attribute to what its layers have become, where all of them became the same."""
    for width in remembered:
        module = network.get_submodule(width.module)
        now = {channels for child, channels in _children(module) if child in width.layers}
        if len(now) == 1:
            setattr(module, width.key, now.pop())


def _children(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, child in module.named_children():
        if isinstance(child, _ConvNd):
            yield name, child.out_channels
        elif isinstance(child, nn.Linear):
            yield name, child.out_features
