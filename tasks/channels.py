"""Channel pruning: which channels hang together, how much each matters, and cutting them out.

Torch-Pruning traces the dependency graph, scores groups and cuts them (Fang et al. 2023, "DepGraph: Towards
Any Structural Pruning"). How many channels each group keeps is decided here, because its own pruner rounds
grouped layers by the wrong count and can pass the largest ratio within one step.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning.ops import OPTYPE

from jetway.configs.schema import Importance
from jetway.tasks.errors import PruningError, WorkloadError
from jetway.tasks.workload import Inputs, Outputs, call_network

logger = logging.getLogger("jetway")

Handler = Callable[..., Any]

_ROOT_TYPES = (_ConvNd, nn.Linear)
_HEADS = ("num_heads", "n_heads", "n_head", "heads", "num_attention_heads")
_FUSED = ("qkv", "to_qkv", "qkv_proj", "Wqkv", "c_attn", "query_key_value")
_SEPARATE = (("q", "k", "v"), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"),
             ("to_q", "to_k", "to_v"), ("wq", "wk", "wv"))  # fmt: skip
# Attributes of attention modules that hold the width of one head, or of all.
_HEAD_WIDTH = ("head_dim", "dim_head", "attention_head_size", "d_head", "d_k")
_INNER_WIDTH = ("inner_dim", "attn_dim", "all_head_size", "embed_dim", "dim", "d_model", "hidden_size")


@dataclass(frozen=True)
class Candidate:
    """A group of coupled layers that lose the same channels together."""

    root: str
    #: Torch-Pruning's function that cuts the root's channels.
    handler: Handler
    #: Every layer and parameter of the group whose own channels go.
    members: tuple[str, ...]
    channels: int
    #: Equal blocks (of a grouped convolution, of attention heads) that must lose the same channels each.
    blocks: int
    #: Importance of each channel of a block, the mean over the blocks.
    scores: Tensor


@dataclass(frozen=True)
class Cut:
    """Channels to cut from a root and from all that hangs on it."""

    root: str
    handler: Handler
    indices: list[int]


@dataclass(frozen=True)
class Limits:
    """How much of each group may go; ``initial`` are its channels before the first step, by root."""

    round_to: int
    max_pruning_ratio: float
    initial: Mapping[str, int]


def make_importance(name: Importance) -> Any:
    """Torch-Pruning's score of a group. Taylor needs gradients in the parameters.

    L1 and L2: Li et al. 2017, "Pruning Filters for Efficient ConvNets", over the whole group. Taylor:
    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning". BatchNorm scale: Liu et al.
    2017, "Learning Efficient Convolutional Networks through Network Slimming".
    """
    makers: dict[Importance, Callable[[], Any]] = {
        Importance.L1: lambda: tp.importance.GroupMagnitudeImportance(p=1),
        Importance.L2: lambda: tp.importance.GroupMagnitudeImportance(p=2),
        Importance.TAYLOR: tp.importance.GroupTaylorImportance,
        Importance.BN_SCALE: tp.importance.BNScaleImportance,
        Importance.RANDOM: tp.importance.RandomImportance,
    }
    return makers[name]()


def trace_dependencies(network: nn.Module, inputs: Inputs, output_names: Sequence[str]) -> Any:
    """Torch-Pruning's dependency graph of one call. Raises PruningError naming the module that failed."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    graph = tp.DependencyGraph()
    with torch.enable_grad(), warnings.catch_warnings(), _failures_named(network, "cannot be traced"):
        # It warns of parameters outside layers, which are pruned by their last dimension, as is right.
        warnings.simplefilter("ignore")
        graph.build_dependency(
            network,
            example_inputs=inputs,
            forward_fn=lambda module, given: _marked_outputs(call_network(module, given, output_names)),
        )
    for node in graph.module2node.values():
        # It takes any split behind a three-dimensional parameter for one of tokens.
        if node.type == OPTYPE.SPLIT:
            node.enable_index_mapping = True
    return graph


def find_candidates(
    network: nn.Module, graph: Any, importance: Any, ignored: frozenset[str]
) -> list[Candidate]:
    """All groups that may lose channels: none that reaches an output, none with an ignored member."""
    blocks = _channel_blocks(network)
    ignored = ignored | _unknown_attention_layers(network)
    found = []
    for group in graph.get_all_groups(root_module_types=_ROOT_TYPES):
        members = tuple(_members(graph, group))
        if _reaches_output(group) or ignored.intersection(members):
            continue
        with _unfollowed(members[0]):
            group = _attention_from_its_end(graph, group, network)
            scores = importance(group)
        count = max([1, *(blocks[name] for name in _blocked(graph, group, blocks))])
        if scores is not None and len(scores) % count == 0:
            found.append(_candidate(graph, group, members, count, scores))
    return found


def plan_cuts(
    candidates: Sequence[Candidate],
    ratio: float,
    ratios: Mapping[str, float],
    limits: Limits,
    *,
    ranked_globally: bool,
) -> list[Cut]:
    """The least important channels of each group, so many that ``ratio`` of the initial ones are gone.

    ``ratios`` names members with a ratio of their own; a group follows the smallest of its members'.
    Channel counts go to the nearest multiple of ``round_to`` and of the group's blocks, never to none.
    """
    own = _own_ratios(candidates, ratios)
    free = [candidate for candidate in candidates if candidate.root not in own]
    ranked = _globally_kept(free, ratio, limits) if ranked_globally and free else {}
    cuts = []
    for candidate in candidates:
        share = own.get(candidate.root, ratio)
        wanted = ranked.get(candidate.root, limits.initial[candidate.root] * (1 - share))
        kept = _allowed_channels(candidate, wanted, limits)
        if kept < candidate.channels:
            cuts.append(_cut(candidate, kept))
    return cuts


def apply_cuts(network: nn.Module, inputs: Inputs, output_names: Sequence[str], cuts: Sequence[Cut]) -> None:
    """Cuts in place, and keeps the widths that attention modules remember in step.

    Raises PruningError when a layer would be left without channels.
    """
    widths = {name: _inner_width(module) for name, module in _attention_modules(network)}
    graph = trace_dependencies(network, inputs, output_names)
    for cut in cuts:
        with _unfollowed(cut.root):
            group = graph.get_pruning_group(network.get_submodule(cut.root), cut.handler, cut.indices)
            if not graph.check_pruning_group(group):
                raise PruningError(
                    f"Pruning {cut.root!r} would leave a layer that depends on it without channels. "
                    "Lower prune.pruning_ratio or prune.max_pruning_ratio, or add it to prune.ignored_layers."
                )
            group.prune()
    for name, module in _attention_modules(network):
        _update_widths(module, widths[name])


def checked_outputs(network: nn.Module, inputs: Inputs, output_names: Sequence[str]) -> Outputs:
    """Outputs of a pruned network. Raises PruningError naming the module whose forward no longer fits."""
    with torch.no_grad(), _failures_named(network, "fails after pruning"):
        return call_network(network, inputs, output_names)


def _own_ratios(candidates: Sequence[Candidate], ratios: Mapping[str, float]) -> dict[str, float]:
    named = {c.root: [ratios[name] for name in c.members if name in ratios] for c in candidates}
    return {root: min(found) for root, found in named.items() if found}


def _marked_outputs(outputs: Outputs) -> list[Tensor]:
    """A last operation after each output, by which the graph knows it even where a layer returned it."""
    marked = [output * 1 for output in outputs.values() if output.grad_fn is not None]
    if not marked:
        raise PruningError(
            "The network's outputs carry no gradient, so its layers cannot be traced. "
            "Take torch.no_grad(), detach() and argmax out of forward; they belong in score_sample."
        )
    return marked


def _members(graph: Any, group: Any) -> Iterator[str]:
    for dep, _ in group:
        if not graph.is_out_channel_pruning_fn(dep.handler):
            continue
        if dep.target.type == OPTYPE.PARAMETER:
            yield graph._param_to_name[dep.target.module]
        elif isinstance(dep.target.module, nn.Module) and dep.target.module in graph._module2name:
            yield graph._module2name[dep.target.module]


def _blocked(graph: Any, group: Any, blocks: Mapping[str, int]) -> Iterator[str]:
    """Layers of the group that want equal blocks, a grouped convolution among them also by its inputs."""
    yield from (name for name in _members(graph, group) if name in blocks)
    for dep, _ in group:
        if isinstance(dep.target.module, _ConvNd) and graph._module2name[dep.target.module] in blocks:
            yield graph._module2name[dep.target.module]


def _reaches_output(group: Any) -> bool:
    return any(dep.target.type == OPTYPE.OUTPUT for dep, _ in group)


def _candidate(graph: Any, group: Any, members: tuple[str, ...], blocks: int, scores: Tensor) -> Candidate:
    root = group[0].dep
    return Candidate(
        root=graph._module2name[root.target.module],
        handler=root.handler,
        members=members,
        channels=len(scores),
        blocks=blocks,
        scores=scores.detach().cpu().view(blocks, -1).mean(dim=0),
    )


def _cut(candidate: Candidate, kept: int) -> Cut:
    size = candidate.channels // candidate.blocks
    dropped = torch.argsort(candidate.scores, stable=True)[: size - kept // candidate.blocks].tolist()
    indices = sorted(block * size + channel for block in range(candidate.blocks) for channel in dropped)
    return Cut(candidate.root, candidate.handler, indices)


def _allowed_channels(candidate: Candidate, wanted: float, limits: Limits) -> int:
    step = math.lcm(limits.round_to, candidate.blocks)
    least = math.ceil(limits.initial[candidate.root] * (1 - limits.max_pruning_ratio) / step) * step
    nearest = math.floor(wanted / step + 0.5) * step
    return min(max(nearest, least, step), candidate.channels)


def _globally_kept(candidates: Sequence[Candidate], ratio: float, limits: Limits) -> dict[str, int]:
    """Channels that each group keeps when all are ranked together; scores are relative to a group's mean."""
    scores = torch.cat([c.scores.repeat(c.blocks) for c in candidates])
    owners = torch.cat([torch.full((c.channels,), i) for i, c in enumerate(candidates)])
    kept = round(sum(limits.initial[c.root] for c in candidates) * (1 - ratio))
    best = torch.argsort(scores, descending=True, stable=True)[:kept]
    counts = torch.bincount(owners[best], minlength=len(candidates)).tolist()
    return {c.root: count for c, count in zip(candidates, counts, strict=True)}


def _channel_blocks(network: nn.Module) -> dict[str, int]:
    """Blocks of the layers whose channels fall into equal blocks, by name."""
    blocks = {}
    for name, module in network.named_modules():
        if isinstance(module, _ConvNd) and 1 < module.groups < module.out_channels:
            blocks[name] = module.groups
        elif isinstance(module, nn.GroupNorm):
            blocks[name] = module.num_groups
        elif isinstance(module, nn.MultiheadAttention):
            blocks[name] = module.num_heads
    for name, module in _attention_modules(network):
        for layer in _projections(module):
            blocks[f"{name}.{layer}".lstrip(".")] = _heads(module)
    return blocks


def _heads(module: nn.Module) -> int:
    found = [vars(module)[key] for key in _HEADS if type(vars(module).get(key)) is int]
    return found[0] if found else 0


def _has_heads(module: nn.Module) -> bool:
    return _heads(module) > 0 and not isinstance(module, nn.MultiheadAttention)


def _below(module: nn.Module) -> list[nn.Module]:
    """All modules inside of this one."""
    return list(module.modules())[1:]


def _projections(module: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers that make queries, keys and values of equal width; empty when not known."""
    for names in (*((name,) for name in _FUSED), *_SEPARATE):
        layers = [getattr(module, name, None) for name in names]
        widths = {layer.out_features if isinstance(layer, nn.Linear) else 0 for layer in layers}
        if len(widths) == 1 and widths.pop() > 0:
            return names
    return ()


def _attention_modules(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Attention written by hand: it knows its heads, and its projections have names that we know."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if _has_heads(module) and _projections(module)
    ]


def _unknown_attention_layers(network: nn.Module) -> frozenset[str]:
    """Linear layers of modules with heads whose projections have other names: left alone, and said so."""
    layers = set()
    for name, module in network.named_modules():
        if not _has_heads(module) or _projections(module) or any(map(_heads, _below(module))):
            continue
        own = {
            f"{name}.{child}".lstrip(".") for child, m in module.named_children() if isinstance(m, nn.Linear)
        }
        if own:
            logger.warning("prune: %r has heads, but no projections of a known name: it stays whole", name)
        layers |= own
    return frozenset(layers)


def _attention_from_its_end(graph: Any, group: Any, network: nn.Module) -> Any:
    """The same group rooted at the layer behind the attention, where an index stands for one channel.

    From a fused projection, each channel would count three times: as query, key and value.
    """
    fused = {
        getattr(module, _projections(module)[0])
        for _, module in _attention_modules(network)
        if len(_projections(module)) == 1
    }
    if group[0].dep.target.module not in fused:
        return group
    ends = [
        (dep, idxs)
        for dep, idxs in group
        if isinstance(dep.target.module, _ROOT_TYPES) and graph.is_in_channel_pruning_fn(dep.handler)
    ]
    if not ends:
        return group
    dep, idxs = ends[-1]
    return graph.get_pruning_group(dep.target.module, dep.handler, idxs)


def _inner_width(module: nn.Module) -> int:
    """Channels of all heads together."""
    names = _projections(module)
    width: int = getattr(module, names[0]).out_features
    return width // 3 if len(names) == 1 else width


def _update_widths(module: nn.Module, old: int) -> None:
    new, heads = _inner_width(module), _heads(module)
    for keys, before, after in ((_HEAD_WIDTH, old // heads, new // heads), (_INNER_WIDTH, old, new)):
        for key in keys:
            if vars(module).get(key) == before:
                setattr(module, key, after)


@contextmanager
def _unfollowed(layer: str) -> Iterator[None]:
    """Turns what Torch-Pruning raises where it loses track of channels into a PruningError."""
    try:
        yield
    except PruningError:
        raise
    except Exception as exc:
        raise PruningError(
            f"The channels of {layer!r} cannot be followed through the network, which splits, reorders or "
            f"reshapes them ({type(exc).__name__}: {exc}). Add {layer!r} to prune.ignored_layers."
        ) from exc


@contextmanager
def _failures_named(network: nn.Module, what: str) -> Iterator[None]:
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
