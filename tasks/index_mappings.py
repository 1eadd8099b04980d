"""Corrects what Torch-Pruning believes of views and slices in networks whose channels lie last.

It takes the second axis for the channels. A view before a linear layer then passes for a flattening of places into
channels, and a slice of rows for one of channels: indices of channels come out multiplied or thinned out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from torch_pruning.dependency.index_mapping import _FlattenIndexMapping, _SliceIndexMapping
from torch_pruning.dependency.shape_infer import infer_out_channels_recursively
from torch_pruning.ops import OPTYPE


def drop_false_mappings(graph: Any) -> None:
    """Takes out of the graph the index mappings that the shapes seen by autograd contradict."""
    for node in graph.module2node.values():
        sizes = list(getattr(node.grad_fn, "_saved_self_sym_sizes", None) or ())
        if node.type == OPTYPE.RESHAPE and sizes:
            _drop(node, _FlattenIndexMapping, lambda mapping, sizes=sizes: _flattens(sizes, mapping._stride))
        elif node.type == OPTYPE.SLICE and sizes and not _slices_channels(graph, node, sizes):
            _drop(node, _SliceIndexMapping, lambda mapping: False)


def _flattens(sizes: Sequence[int], stride: int) -> bool:
    """Whether a view of a tensor of these sizes can join ``stride`` places to each channel, or part them again."""
    return len(sizes) <= 2 or prod(sizes[2:]) == stride


def _slices_channels(graph: Any, node: Any, sizes: Sequence[int]) -> bool:
    axis = node.grad_fn._saved_dim
    channels = infer_out_channels_recursively(graph, node.inputs[0], [0])
    return axis >= len(sizes) or channels is None or sizes[axis] == channels


def _drop(node: Any, kind: type, is_true: Any) -> None:
    for dependency in _dependencies(node):
        dependency.index_mapping = [
            None if isinstance(mapping, kind) and not is_true(mapping) else mapping
            for mapping in dependency.index_mapping
        ]


def _dependencies(node: Any) -> Iterator[Any]:
    """Those of the node, and those of its neighbours that lead to it."""
    yield from node.dependencies
    for neighbour in {*node.inputs, *node.outputs}:
        yield from (dependency for dependency in neighbour.dependencies if dependency.target is node)
