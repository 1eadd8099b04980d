"""Channel pruning: which channels hang together, how much each matters, and cutting them out.

Torch-Pruning traces the dependency graph, scores groups and cuts them (Fang et al. 2023, "DepGraph: Towards
Any Structural Pruning"). How many channels each group keeps is decided here, because its own pruner rounds
grouped layers by the wrong count and can pass the largest ratio within one step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning.ops import OPTYPE

from jetway.configs.schema import Importance
from jetway.tasks.attention import (
    Attention,
    attention_widths,
    cut_attention,
    find_attention,
    fused_projections,
    head_counts,
    is_bridge,
    score_channels,
    unknown_attention_layers,
    update_widths,
)
from jetway.tasks.dependencies import failures_named, trace_dependencies
from jetway.tasks.errors import PruningError
from jetway.tasks.widths import find_widths, update_remembered
from jetway.tasks.workload import Inputs, Outputs, call_network

logger = logging.getLogger("jetway")

Handler = Callable[..., Any]

_ROOT_TYPES = (_ConvNd, nn.Linear)


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
    #: Importance of each block, the mean over its channels.
    block_scores: Tensor
    #: The attention whose heads the blocks are, and that is cut without Torch-Pruning.
    attention: Attention | None = None


@dataclass(frozen=True)
class Cut:
    """Channels to cut from a root and from all that hangs on it."""

    root: str
    handler: Handler
    indices: list[int]
    attention: Attention | None = None
    #: Heads that go as a whole; their channels are among the indices.
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Limits:
    """How much of each group may go; ``initial`` are its channels and heads before the first step, by root."""

    round_to: int
    max_pruning_ratio: float
    initial: Mapping[str, int]
    initial_heads: Mapping[str, int] = field(default_factory=dict)


def make_importance(name: Importance) -> Any:
    """Torch-Pruning's score of a group. Taylor and Hessian read the parameters' ``grad``.

    L1 and L2: Li et al. 2017, "Pruning Filters for Efficient ConvNets", over the whole group. Taylor:
    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning". BatchNorm scale: Liu et al.
    2017, "Learning Efficient Convolutional Networks through Network Slimming". Hessian: LeCun, Denker & Solla
    1990, "Optimal Brain Damage".
    """
    makers: dict[Importance, Callable[[], Any]] = {
        Importance.L1: lambda: tp.importance.GroupMagnitudeImportance(p=1),
        Importance.L2: lambda: tp.importance.GroupMagnitudeImportance(p=2),
        Importance.TAYLOR: tp.importance.GroupTaylorImportance,
        # Its own accumulation is not used: it keeps the last sample's gradient only.
        Importance.HESSIAN: tp.importance.GroupHessianImportance,
        Importance.BN_SCALE: tp.importance.BNScaleImportance,
        Importance.RANDOM: tp.importance.RandomImportance,
    }
    return makers[name]()


def find_candidates(
    network: nn.Module, graph: Any, importance: Any, ignored: frozenset[str]
) -> list[Candidate]:
    """All groups that may lose channels: none that reaches an output, none with an ignored member."""
    blocks, attentions = _channel_blocks(network), find_attention(network)
    apart = {name for attention in attentions for name in attention.projections}
    ignored = ignored | unknown_attention_layers(network)
    found: list[Candidate | None] = [
        _attention_candidate(network, attention, importance)
        for attention in attentions
        if ignored.isdisjoint(attention.members)
    ]
    for group in graph.get_whole_groups(_ROOT_TYPES):
        members = tuple(_members(graph, group))
        if not apart.isdisjoint(members) or any(map(is_bridge, members)):
            continue
        if _reaches_output(group) or ignored.intersection(members):
            continue
        with _unfollowed(members[0]):
            group = _attention_from_its_end(graph, group, network)
            scores = importance(group)
        parts = graph.part_counts(group, len(scores)) if scores is not None else ()
        count = math.lcm(*(blocks[name] for name in _blocked(graph, group, blocks)), *parts)
        if scores is not None and len(scores) % count == 0:
            found.append(_candidate(graph, group, members, count, scores))
    if graph.unfollowed:
        logger.warning(
            "prune: these layers stay whole, as views hide which channel is which: %s",
            ", ".join(graph.unfollowed),
        )
    return [candidate for candidate in found if candidate is not None]


def plan_cuts(
    candidates: Sequence[Candidate],
    ratio: float,
    ratios: Mapping[str, float],
    limits: Limits,
    *,
    ranked_globally: bool,
    head_ratios: Mapping[str, float] | None = None,
) -> list[Cut]:
    """The least important channels of each group, so many that ``ratio`` of the initial ones are gone.

    ``ratios`` names members with a ratio of their own; a group follows the smallest of its members'.
    Channel counts go to the nearest multiple of ``round_to`` and of the group's blocks, never to none; with a
    ratio of 0 they stay. ``head_ratios`` are the shares of whole heads that go, by attention module.
    """
    own = _own_ratios(candidates, ratios)
    free = [candidate for candidate in candidates if candidate.root not in own]
    ranked = _globally_kept(free, ratio, limits) if ranked_globally and free else {}
    cuts = []
    for candidate in candidates:
        share = own.get(candidate.root, ratio)
        blocks = _kept_blocks(candidate, head_ratios or {}, limits)
        wanted = ranked.get(candidate.root, limits.initial[candidate.root] * (1 - share))
        kept = _allowed_channels(candidate, wanted, blocks, limits)
        if kept < candidate.channels:
            cuts.append(_cut(candidate, kept, blocks))
    return cuts


def apply_cuts(network: nn.Module, inputs: Inputs, output_names: Sequence[str], cuts: Sequence[Cut]) -> None:
    """Cuts in place, and keeps the widths that modules remember in step.

    Raises PruningError when a layer would be left without channels.
    """
    remembered = find_widths(network)
    for cut in cuts:
        if cut.attention:
            cut_attention(network, cut.attention, cut.indices, cut.heads)
    widths = attention_widths(network)
    graph = trace_dependencies(network, inputs, output_names)
    for cut in (cut for cut in cuts if not cut.attention):
        with _unfollowed(cut.root):
            group = graph.get_pruning_group(network.get_submodule(cut.root), cut.handler, cut.indices)
            if not graph.check_pruning_group(group):
                raise PruningError(
                    f"Pruning {cut.root!r} would leave a layer that depends on it without channels. "
                    "Lower prune.pruning_ratio or prune.max_pruning_ratio, or add it to prune.ignored_layers."
                )
            group.prune()
        if graph.is_split(group):  # it does not follow where the parts begin now
            sizes = graph.part_sizes(group)
            graph = trace_dependencies(network, inputs, output_names)
            if graph.part_sizes() != sizes:
                raise PruningError(
                    f"Pruning {cut.root!r} would move the places where the network splits its channels. "
                    "Add it to prune.ignored_layers."
                )
    for name, (width, heads) in widths.items():
        update_widths(network.get_submodule(name), width, heads)
    update_remembered(network, remembered)


def checked_outputs(network: nn.Module, inputs: Inputs, output_names: Sequence[str]) -> Outputs:
    """Outputs of a pruned network. Raises PruningError naming the module whose forward no longer fits."""
    with torch.no_grad(), failures_named(network, "fails after pruning"):
        return call_network(network, inputs, output_names)


def _own_ratios(candidates: Sequence[Candidate], ratios: Mapping[str, float]) -> dict[str, float]:
    named = {c.root: [ratios[name] for name in c.members if name in ratios] for c in candidates}
    return {root: min(found) for root, found in named.items() if found}


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
    by_block = scores.detach().cpu().view(blocks, -1)
    return Candidate(
        root=graph._module2name[root.target.module],
        handler=root.handler,
        members=members,
        channels=len(scores),
        blocks=blocks,
        scores=by_block.mean(dim=0),
        block_scores=by_block.mean(dim=1),
    )


def _attention_candidate(network: nn.Module, attention: Attention, importance: Any) -> Candidate | None:
    scores = score_channels(network, attention, importance)
    if scores is None:
        return None
    by_head = scores.detach().cpu().view(attention.heads, -1)
    return Candidate(
        root=attention.projections[0],
        handler=tp.prune_linear_out_channels,
        members=attention.members,
        channels=attention.width,
        blocks=attention.heads,
        attention=attention,
        scores=by_head.mean(dim=0),
        block_scores=by_head.mean(dim=1),
    )


def _cut(candidate: Candidate, kept: int, blocks: int) -> Cut:
    """The least important blocks as a whole, and of those that stay the least important channels."""
    size = candidate.channels // candidate.blocks
    gone = torch.argsort(candidate.block_scores, stable=True)[: candidate.blocks - blocks].tolist()
    dropped = torch.argsort(candidate.scores, stable=True)[: size - kept // blocks].tolist()
    indices = [
        block * size + channel
        for block in range(candidate.blocks)
        for channel in (range(size) if block in gone else sorted(dropped))
    ]
    return Cut(candidate.root, candidate.handler, indices, candidate.attention, tuple(sorted(gone)))


def _kept_blocks(candidate: Candidate, head_ratios: Mapping[str, float], limits: Limits) -> int:
    """Heads that stay, to the nearest, at least one; the blocks of anything else all stay."""
    share = head_ratios.get(candidate.attention.name, 0.0) if candidate.attention else 0.0
    initial = limits.initial_heads.get(candidate.root, candidate.blocks)
    least = math.ceil(initial * (1 - limits.max_pruning_ratio))
    return min(max(round(initial * (1 - share)), least, 1), candidate.blocks)


def _allowed_channels(candidate: Candidate, wanted: float, blocks: int, limits: Limits) -> int:
    """``wanted`` of the initial channels, were all blocks there, as a count for ``blocks`` of them."""
    initial, most = limits.initial[candidate.root], candidate.channels // candidate.blocks * blocks
    if wanted == initial:
        return most
    share = blocks / limits.initial_heads.get(candidate.root, candidate.blocks)
    step = math.lcm(limits.round_to, blocks)
    least = math.ceil(initial * share * (1 - limits.max_pruning_ratio) / step) * step
    nearest = math.floor(wanted * share / step + 0.5) * step
    return min(max(nearest, least, step), most)


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
    return blocks | head_counts(network)


def _attention_from_its_end(graph: Any, group: Any, network: nn.Module) -> Any:
    """The same group rooted at the layer behind the attention, where an index stands for one channel.

    From a fused projection, each channel would count three times: as query, key and value.
    """
    if group[0].dep.target.module not in fused_projections(network):
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
