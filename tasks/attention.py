"""Attention written by hand: where its heads are, what they are worth, and how heads and their channels go.

Attention is known by an attribute that counts its heads, by projections of known names, and by one linear layer
behind them that takes what the heads give. What lies between belongs to the module: no trace is needed to know
that channel ``i`` of query, key and value, and input ``i`` of the layer behind, go together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from jetway.tasks.errors import PruningError

logger = logging.getLogger("jetway")

_HEADS = ("num_heads", "n_heads", "n_head", "heads", "num_attention_heads")
_FUSED = ("qkv", "to_qkv", "qkv_proj", "Wqkv", "c_attn", "query_key_value")
_SEPARATE = (("q", "k", "v"), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"),
             ("to_q", "to_k", "to_v"), ("wq", "wk", "wv"))  # fmt: skip
# Attributes of attention modules that hold the width of one head, or of all.
_HEAD_WIDTH = ("head_dim", "dim_head", "attention_head_size", "d_head", "d_k")
_INNER_WIDTH = ("inner_dim", "attn_dim", "all_head_size", "embed_dim", "dim", "d_model", "hidden_size")
# Child that stands in for the inside of an attention while the network is traced.
_BRIDGE = "jetway_bridge"


@dataclass(frozen=True)
class Attention:
    """An attention module, by the names of its layers in the network."""

    name: str
    projections: tuple[str, ...]
    #: The linear layer behind the heads.
    output: str
    heads: int
    #: Channels of all heads together.
    width: int

    @property
    def members(self) -> tuple[str, ...]:
        """Names by which the recipe may speak of the heads' channels."""
        return (self.name, *self.projections)


def find_attention(network: nn.Module) -> list[Attention]:
    """Attention modules that hold all their layers, the one behind the heads included."""
    return [
        Attention(name, tuple(_path(name, layer) for layer in layers), output, _heads(module), width)
        for name, module in network.named_modules()
        if (layers := projections(module)) and _has_heads(module)
        for width in [inner_width(module)]
        for output in _outputs(name, module, layers, width)
    ]


def head_counts(network: nn.Module) -> dict[str, int]:
    """Heads of the attention whose inside a trace must follow, by projection: the layer behind is elsewhere."""
    closed = {attention.name for attention in find_attention(network)}
    return {
        _path(name, layer): _heads(module)
        for name, module in _known_attention(network)
        if name not in closed
        for layer in projections(module)
    }


def fused_projections(network: nn.Module) -> set[nn.Module]:
    """Layers that make queries, keys and values at once."""
    return {
        getattr(module, names[0])
        for _, module in _known_attention(network)
        if len(names := projections(module)) == 1
    }


def unknown_attention_layers(network: nn.Module) -> frozenset[str]:
    """Linear layers of modules with heads whose projections have other names: left alone, and said so."""
    layers = set()
    for name, module in network.named_modules():
        if not _has_heads(module) or projections(module) or any(map(_heads, list(module.modules())[1:])):
            continue
        own = {_path(name, child) for child, m in module.named_children() if isinstance(m, nn.Linear)}
        if own:
            logger.warning("prune: %r has heads, but no projections of a known name: it stays whole", name)
        layers |= own
    return frozenset(layers)


def score_channels(network: nn.Module, attention: Attention, importance: Any) -> Tensor | None:
    """Importance of each channel of the heads, summed up as Torch-Pruning does for coupled layers."""
    every = list(range(attention.width))
    rows = [
        (network.get_submodule(name), part) for name in attention.projections for part in _parts(attention)
    ]
    items = [
        _Item(layer, tp.prune_linear_out_channels, [i + start for i in every], every) for layer, start in rows
    ]
    behind = network.get_submodule(attention.output)
    scores: Tensor | None = importance([*items, _Item(behind, tp.prune_linear_in_channels, every, every)])
    return scores


def cut_attention(
    network: nn.Module, attention: Attention, indices: Sequence[int], heads: Sequence[int]
) -> None:
    """Takes channels out of all heads: ``indices`` counts them over all heads, ``heads`` are the heads that go.

    Raises PruningError for a tensor of the module of which it is not clear what belongs to which head.
    """
    module = network.get_submodule(attention.name)
    for name in attention.projections:
        rows = [index + start for start in _parts(attention) for index in indices]
        tp.prune_linear_out_channels(network.get_submodule(name), rows)
    tp.prune_linear_in_channels(network.get_submodule(attention.output), list(indices))
    if heads:
        _drop_heads(module, attention, heads)
    update_widths(module, attention.width, attention.heads)


def update_widths(module: nn.Module, old_width: int, old_heads: int) -> None:
    """Keeps the widths that an attention module remembers in step with its layers."""
    new, heads = inner_width(module), _heads(module)
    changes = ((_HEAD_WIDTH, old_width // old_heads, new // heads), (_INNER_WIDTH, old_width, new))
    for keys, before, after in changes:
        for key in keys:
            if vars(module).get(key) == before:
                setattr(module, key, after)


def attention_widths(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Channels of all heads and number of heads, by module."""
    return {name: (inner_width(module), _heads(module)) for name, module in _known_attention(network)}


@contextmanager
def bridged(network: nn.Module) -> Iterator[None]:
    """Within, a trace sees two linear layers in the place of what lies between projections and output.

    So widths before and behind the attention are followed, and the inside, which may index, roll and permute as
    it likes, is not. Values change; shapes do not.
    """
    handles: list[Any] = []
    attentions = find_attention(network)
    try:
        for attention in attentions:
            handles += _Bridge(network, attention).hooks()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in attentions:
            del network.get_submodule(attention.name)._modules[_BRIDGE]


def is_bridge(name: str) -> bool:
    return f".{_BRIDGE}." in f".{name}."


def projections(module: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers that make queries, keys and values of equal width; empty when not known."""
    for names in (*((name,) for name in _FUSED), *_SEPARATE):
        layers = [getattr(module, name, None) for name in names]
        widths = {layer.out_features if isinstance(layer, nn.Linear) else 0 for layer in layers}
        if len(widths) == 1 and widths.pop() > 0:
            return names
    return ()


def inner_width(module: nn.Module) -> int:
    """Channels of all heads together."""
    names = projections(module)
    width: int = getattr(module, names[0]).out_features
    return width // 3 if len(names) == 1 else width


class _Item(tuple[Any, list[int]]):
    """What Torch-Pruning's importances want of a layer in a group: how it is cut, and where."""

    root_idxs: list[int]

    def __new__(cls, layer: nn.Module, handler: Any, indices: list[int], root_idxs: list[int]) -> _Item:
        dep = SimpleNamespace(
            target=SimpleNamespace(module=layer), handler=handler, layer=layer, pruning_fn=handler
        )
        item = super().__new__(cls, (dep, indices))
        item.root_idxs = root_idxs
        return item


def _parts(attention: Attention) -> list[int]:
    """Where queries, keys and values start within one projection."""
    return [0, attention.width, 2 * attention.width] if len(attention.projections) == 1 else [0]


def _known_attention(network: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (n, module) for n, module in network.named_modules() if _has_heads(module) and projections(module)
    ]


def _outputs(name: str, module: nn.Module, layers: Sequence[str], width: int) -> list[str]:
    """The linear layer behind the heads, when there is just one that fits."""
    own = {getattr(module, layer) for layer in layers}
    found = [
        _path(name, child)
        for child, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer not in own and layer.in_features == width
    ]
    return found if len(found) == 1 else []


def _heads(module: nn.Module) -> int:
    found = [vars(module)[key] for key in _HEADS if type(vars(module).get(key)) is int]
    return found[0] if found else 0


def _has_heads(module: nn.Module) -> bool:
    return _heads(module) > 0 and not isinstance(module, nn.MultiheadAttention)


def _path(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _drop_heads(module: nn.Module, attention: Attention, heads: Sequence[int]) -> None:
    kept = torch.tensor([head for head in range(attention.heads) if head not in set(heads)])
    for name, parameter in list(module.named_parameters(recurse=False)):
        axis = _head_axis(f"{attention.name}.{name}", parameter, attention.heads)
        if axis is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().index_select(axis, kept))
    for name, buffer in list(module.named_buffers(recurse=False)):
        axis = _head_axis(f"{attention.name}.{name}", buffer, attention.heads)
        if axis is not None and buffer.is_floating_point():
            module._buffers[name] = buffer.index_select(axis, kept)
    for key in _HEADS:
        if vars(module).get(key) == attention.heads:
            setattr(module, key, len(kept))


def _head_axis(name: str, tensor: Tensor, heads: int) -> int | None:
    """The axis of a module's own tensor along which heads lie, as in a table of relative positions."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size == heads]
    if len(axes) > 1 and tensor.is_floating_point():
        raise PruningError(
            f"{name!r} has shape {tuple(tensor.shape)}, in which {heads} heads may lie along more than one axis. "
            "Leave this attention out of prune.head_ratios."
        )
    return axes[0] if axes else None


class _Bridge:
    """Two linear layers in the place of what lies between an attention's projections and its output."""

    def __init__(self, network: nn.Module, attention: Attention) -> None:
        self.module, self.output = (
            network.get_submodule(attention.name),
            network.get_submodule(attention.output),
        )
        self.projections: list[Any] = [network.get_submodule(name) for name in attention.projections]
        self.before = nn.ModuleList(nn.Linear(layer.out_features, 1) for layer in self.projections)
        self.behind = nn.Linear(attention.width, attention.width)
        self.module.add_module(_BRIDGE, nn.ModuleList([self.before, self.behind]))
        self.seen: list[Tensor] = []
        self.are_called = False

    def hooks(self) -> list[Any]:
        pairs = zip(self.projections, self.before, strict=True)
        kept = [layer.register_forward_hook(partial(self.keep, before)) for layer, before in pairs]
        crossed = self.output.register_forward_pre_hook(self.cross)
        return [*kept, crossed, self.module.register_forward_hook(self.call_layers)]

    def keep(self, before: nn.Module, _: nn.Module, given: Any, made: Tensor) -> None:
        self.are_called = True
        self.seen.append(before(made).sum())

    def cross(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        joined = self.behind(arguments[0].detach() + sum(self.seen))
        self.seen.clear()
        return (joined, *arguments[1:])

    def call_layers(self, _: nn.Module, arguments: tuple[Tensor, ...], made: Tensor) -> Tensor | None:
        """For an attention that hands its layers' weights to a function: the layers themselves, called."""
        stand_in = None if self.are_called else self._stand_in(arguments[0])
        self.are_called = False
        return stand_in if stand_in is not None and stand_in.shape == made.shape else None

    def _stand_in(self, given: Tensor) -> Tensor:
        for layer in self.projections:
            layer(given)
        made: Tensor = self.output(given.new_zeros(*given.shape[:-1], self.behind.in_features))
        return made
