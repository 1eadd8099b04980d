"""Which layers lose channels together: Torch-Pruning's dependency graph, where it needs help.

Fang et al. 2023, "DepGraph: Towards Any Structural Pruning". Corrected here: how groups are searched, parts of split
tensors, factors that are spread over another tensor, views and slices of networks whose channels lie last.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency.group import Group
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping, update_index_mapping
from torch_pruning.dependency.node import Node
from torch_pruning.dependency.shape_infer import infer_out_channels_recursively
from torch_pruning.ops import OPTYPE, _OutputOp

from jetway.tasks.attention import bridged
from jetway.tasks.errors import PruningError, WorkloadError
from jetway.tasks.index_mappings import drop_false_mappings
from jetway.tasks.workload import Inputs, Outputs, call_network

#: A layer and the function that cuts it: what a search comes by.
_Place = tuple[Node, Callable[..., Any]]
#: Channels of a layer, each with the channel of the root that leads there.
_Channels = dict[int, _HybridIndex]

_SPLITS = (torch.split, torch.chunk, Tensor.split, Tensor.chunk)
_JOINS = (torch.cat, torch.concat, torch.concatenate)


class UnfollowedError(Exception):
    """Channels cannot be followed through the network."""


def trace_dependencies(network: nn.Module, inputs: Inputs, output_names: Sequence[str]) -> Dependencies:
    """The dependency graph of one call. Raises PruningError naming the module that failed."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    places = _Places()
    graph = Dependencies(places)
    with (
        bridged(network),
        torch.enable_grad(),
        warnings.catch_warnings(),
        failures_named(network, "cannot be traced"),
        places,
    ):
        # It warns of parameters outside layers, which are pruned by their last dimension, as is right.
        warnings.simplefilter("ignore")
        graph.build_dependency(
            network,
            example_inputs=inputs,
            forward_fn=lambda module, given: _marked_outputs(call_network(module, given, output_names)),
        )
    drop_false_mappings(graph)
    for node in graph.module2node.values():
        # It takes any split behind a three-dimensional parameter for one of tokens.
        if node.type == OPTYPE.SPLIT:
            node.enable_index_mapping = True
    return graph


class Dependencies(tp.DependencyGraph):  # type: ignore[misc]
    """Follows each channel once, and knows which factors do not lose channels with what they are spread over.

    Such factors are the weights of places, as in spatial attention. What made one keeps its channels, as what makes an
    output does: nobody knows any more which of them lies where.
    """

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places
        self.unfollowed: list[str] = []

    def get_pruning_group(
        self, module: nn.Module, pruning_fn: Callable[..., Any], idxs: Sequence[int]
    ) -> Any:
        """All that must be cut with these channels of ``module``.

        Torch-Pruning's own search comes by a layer once for each set of channels that leads there, of which there
        are exponentially many where tensors are split, passed on in part, and joined again, as in YOLO.
        """
        if isinstance(module, _ConvNd) and 1 < module.out_channels == module.groups:
            pruning_fn = tp.prune_depthwise_conv_out_channels
        update_index_mapping(self)
        self._map_joins()
        node = self.module2node[module]
        root = tp.Dependency(pruning_fn, pruning_fn, source=node, target=node)
        group = Group()
        group._DG = self
        first = {index: _HybridIndex(index, index) for index in idxs}
        for dependency, channels in self._followed(root, first):
            group.add_dep(dependency, list(channels))
            group[-1].root_idxs = [each.root_idx for each in channels.values()]
        return group

    def get_whole_groups(self, root_types: tuple[type[nn.Module], ...]) -> Iterator[Any]:
        """All groups, each once, from a root whose channels are all in it even where parts of them go other ways.

        ``unfollowed`` names the layers that have none, because views leave nobody to know which channel is which.
        """
        taken: set[Any] = set()
        for module, node in self.module2node.items():
            if node in taken or not isinstance(module, root_types):
                continue
            try:
                group = self._from_widest(self._group_of(node, module), root_types)
            except UnfollowedError:
                self.unfollowed.append(self._module2name[module])
                continue
            if group[0].dep.target not in taken:
                taken.update(
                    item.dep.target for item in group if self.is_out_channel_pruning_fn(item.dep.handler)
                )
                yield group

    def _group_of(self, node: Node, module: nn.Module) -> Any:
        pruner = self.get_pruner_of_module(module)
        return self.get_pruning_group(module, pruner.prune_out_channels, range(self.get_out_channels(node)))

    def _from_widest(self, group: Any, root_types: tuple[type[nn.Module], ...]) -> Any:
        """The same group, or the one of the widest layer of which it holds a part."""
        widths = {
            item.dep: self.get_out_channels(item.dep.target)
            for item in group
            if self.is_out_channel_pruning_fn(item.dep.handler)
            and isinstance(item.dep.target.module, root_types)
        }
        widest = max(widths, key=lambda dep: widths[dep])
        if not self.places.parts or widths[widest] <= len(group[0].idxs):
            return group
        return self._from_widest(self._group_of(widest.target, widest.target.module), root_types)

    def part_counts(self, group: Any, channels: int) -> Iterator[int]:
        """Into how many equal parts the network splits a tensor whose channels are the root's."""
        for item in group:
            part = self.places.parts.get(item.dep.target.grad_fn)
            if part and part.size * part.count == channels:
                pairs = zip(item.idxs, item.root_idxs, strict=True)
                if all(index + part.start == root for index, root in pairs):
                    yield part.count

    def is_split(self, group: Any) -> bool:
        """Whether a cut of it moves what the places of parts are counted by."""
        moved = {item.dep.target.grad_fn for item in group}
        parts, joins = self.places.parts, self.places.joins
        return bool(parts) and not (moved.isdisjoint(parts) and moved.isdisjoint(joins))

    def part_sizes(self, group: Any = ()) -> list[int]:
        """Channels of each part of what is split, less those that a cut of ``group`` takes from it."""
        lost = {item.dep.target.grad_fn: len(item.idxs) for item in group}
        used = {node.grad_fn for node in self.module2node.values()}
        return [part.size - lost.get(node, 0) for node, part in self.places.parts.items() if node in used]

    def _followed(self, root: Any, channels: _Channels) -> Iterator[tuple[Any, _Channels]]:
        """Each layer that is reached from the root, by the first dependency that led there, and its channels.

        Raises UnfollowedError where these are more than a layer has.
        """
        most = self._most_channels()
        found: dict[_Place, tuple[Any, _Channels]] = {(root.target, root.handler): (root, dict(channels))}
        waiting = [(root, list(channels.values()))]
        while waiting:
            dependency, arrived = waiting.pop()
            for onward in dependency.target.dependencies:
                if not onward.is_triggered_by(dependency.handler):
                    continue
                place = (onward.target, onward.handler)
                known = found[place][1] if place in found else {}
                new = _unknown(_mapped(onward, arrived), known)
                if new:
                    if max(new) >= (self._channels_at(onward) or most):
                        raise UnfollowedError("more channels than a layer has")
                    found.setdefault(place, (onward, {}))[1].update(new)
                    waiting.append((onward, list(new.values())))
        yield from found.values()

    def _channels_at(self, dependency: Any) -> int | None:
        """Channels that the function of a dependency may take; None where they are not a layer's."""
        comes_out = self.is_out_channel_pruning_fn(dependency.handler)
        channels: int | None = (self.get_out_channels if comes_out else self.get_in_channels)(
            dependency.target
        )
        return channels

    def _most_channels(self) -> int:
        """No layer and no output has more."""
        nodes = self.module2node.values()
        widths = [
            width(node) or 0 for node in nodes for width in (self.get_out_channels, self.get_in_channels)
        ]
        outputs = [prod(node.module.shape[1:]) for node in nodes if node.type == OPTYPE.OUTPUT]
        most: int = max([*widths, *outputs])
        return most

    def _map_joins(self) -> None:
        """Torch-Pruning infers the sizes of what is joined from layers around it, which it cannot of parts."""
        for node in self.module2node.values() if self.places.parts else ():
            spans = self.places.joins.get(node.grad_fn, ())
            for index, (source, span) in enumerate(zip(node.inputs, spans, strict=False)):
                nth = node.inputs[:index].count(source)
                _nth(node, source, nth).index_mapping[1] = _ConcatIndexMapping(span, reverse=True)
                _nth(source, node, nth).index_mapping[1] = _ConcatIndexMapping(span)

    def _trace(self, *args: Any, **kwargs: Any) -> Any:
        nodes = super()._trace(*args, **kwargs)
        makers = {node.grad_fn: node for node in nodes.values()}
        for product in list(nodes.values()):
            for maker, factor, other in _factors(product.grad_fn):
                if maker in makers and self._is_spread(makers[maker], factor, other):
                    self._set_apart(makers[maker], product, factor.shape)
        return nodes

    def _is_spread(self, node: Any, factor: Tensor, other: Tensor) -> bool:
        """Whether ``factor`` is broadcast against ``other`` and no axis of it holds its layer's channels."""
        pairs = zip(reversed(factor.shape), reversed(other.shape), strict=False)
        if node.type == OPTYPE.PARAMETER or not any(one == 1 < many for one, many in pairs):
            return False
        channels = infer_out_channels_recursively(self, node, [0])
        return channels is not None and (channels == 1 or channels not in factor.shape)

    def _set_apart(self, factor: Any, product: Any, shape: torch.Size) -> None:
        product.inputs.remove(factor)
        factor.outputs[factor.outputs.index(product)] = Node(_OutputOp(self._op_id, shape), None)
        self._op_id += 1


@dataclass(frozen=True)
class _Part:
    """Channels of a tensor that go their own way; one of ``count`` equal parts, or of unequal ones if that is 0."""

    start: int
    size: int
    count: int


class _Places(TorchFunctionMode):
    """Notes where in the channels of images parts begin that are split off or joined.

    Splits become slices, which say where they begin: Torch-Pruning knows the parts of a split by the order of their
    uses alone, which is wrong where one of them is used more than once.
    """

    def __init__(self) -> None:
        super().__init__()
        #: By the operation that split it off.
        self.parts: dict[Any, _Part] = {}
        #: First channel of each part and the one behind its last, by the operation that joined them.
        self.joins: dict[Any, list[tuple[int, int]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given: dict[Any, Any] = {**dict(enumerate(args)), **(kwargs or {})}
        result = func(*args, **(kwargs or {}))
        axis = given.get("dim", given.get("axis"))
        if func in _SPLITS and _are_channels(result[0], given.get(2, 0) if axis is None else axis):
            return self._sliced(_first(given), result)
        if func in _JOINS and _are_channels(result, given.get(1, 0) if axis is None else axis):
            joined = _first(given)
            spans = zip(_spans(joined), joined, strict=True)
            self.joins[result.grad_fn] = [span for span, part in spans if part.requires_grad]
        return result

    def _sliced(self, whole: Tensor, split: Sequence[Tensor]) -> tuple[Tensor, ...]:
        spans = list(_spans(split))
        parts = tuple(whole.narrow(1, start, stop - start) for start, stop in spans)
        count = len(spans) if len({stop - start for start, stop in spans}) == 1 else 0
        for part, (start, stop) in zip(parts, spans, strict=True):
            self.parts[part.grad_fn] = _Part(start, stop - start, count)
        return parts


@contextmanager
def failures_named(network: nn.Module, what: str) -> Iterator[None]:
    """Turns an error inside ``forward`` into a PruningError that names the innermost module."""
    entered: list[str] = []

    def enter(name: str, *_: Any) -> None:
        entered.append(name)

    def leave(*_: Any) -> None:
        entered.pop()

    handles: list[Any] = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    except (PruningError, WorkloadError):
        raise
    except Exception as exc:
        where = f"module {entered[-1]!r}" if entered and entered[-1] else "the network's forward"
        raise PruningError(
            f"The network {what}: {where} raises {type(exc).__name__}: {exc}. If it uses a fixed number of "
            "channels (view(n, 64)), take it from the tensor (flatten, shape); or add the module, and those "
            "that it takes its input from, to prune.ignored_layers."
        ) from exc
    finally:
        for handle in handles:
            handle.remove()


def _unknown(arrived: Sequence[_HybridIndex], known: _Channels) -> _Channels:
    """The first of those that lead to the same channel counts."""
    new: _Channels = {}
    for each in arrived:
        if each.idx not in known:
            new.setdefault(each.idx, each)
    return new


def _mapped(dependency: Any, channels: list[_HybridIndex]) -> list[_HybridIndex]:
    for mapping in dependency.index_mapping:
        channels = mapping(channels) if mapping is not None else channels
    return channels


def _first(given: dict[Any, Any]) -> Any:
    """The first argument, whether by place or by one of PyTorch's names for it."""
    return next(given[name] for name in (0, "tensor", "tensors", "input", "self") if name in given)


def _are_channels(images: Tensor, axis: int) -> bool:
    return images.dim() == 4 and axis in (1, -3) and images.requires_grad


def _spans(parts: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """First channel of each part and the one behind its last; PyTorch passes over empty ones of one dimension."""
    return pairwise(accumulate((part.shape[1] if part.dim() > 1 else 0 for part in parts), initial=0))


def _nth(source: Node, target: Node, nth: int) -> Any:
    return [dependency for dependency in source.dependencies if dependency.target is target][nth]


def _factors(grad_fn: Any) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """What made each factor of an element-wise product of two, the factor, and the other one."""
    if type(grad_fn).__name__ != "MulBackward0":
        return
    factors = (grad_fn._saved_self, grad_fn._saved_other)
    if all(factor is not None for factor in factors):
        makers = [maker for maker, _ in grad_fn.next_functions]
        yield from zip(makers, factors, reversed(factors), strict=True)


def _marked_outputs(outputs: Outputs) -> list[Tensor]:
    """A last operation after each output, by which the graph knows it even where a layer returned it."""
    marked = [output * 1 for output in outputs.values() if output.grad_fn is not None]
    if not marked:
        raise PruningError(
            "The network's outputs carry no gradient, so its layers cannot be traced. "
            "Take torch.no_grad(), detach() and argmax out of forward; they belong in score_sample."
        )
    return marked
