"""Depth pruning: which blocks of a network matter least, and taking them out.

A block is a direct child of a container that has layers of its own, runs once in a forward pass, and returns one
tensor of the shape that it was given: what is left of it when it goes is its residual connection.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jetway.configs.schema import DepthConfig
from jetway.tasks.channels import checked_outputs
from jetway.tasks.errors import ConfigError, PruningError
from jetway.tasks.importance import BATCH_SIZE, mean_loss, training_batches
from jetway.tasks.stage import StageContext
from jetway.tasks.workload import Inputs, call_network

_KEY = "prune.depth"


@dataclass(frozen=True)
class Round:
    """One block that went, and what each block of the same container was worth just before."""

    container: str
    removed: str
    importances: dict[str, float]


def prune_depth(context: StageContext, network: nn.Module, config: DepthConfig) -> list[Round]:
    """Takes the least important blocks out of each container, in place, one by one.

    What the others are worth is measured again after each: two blocks may stand in for each other.
    Raises ConfigError for a pattern without blocks or more blocks to keep than there are, PruningError for a
    block that cannot be left out.
    """
    inputs, names = context.workload.example_inputs(), context.workload.output_names
    containers = matching_containers(network, inputs, names, config)
    batches = list(training_batches(context, config.samples, BATCH_SIZE))
    rounds: list[Round] = []
    for container, keep in containers.items():
        # a container inside of a block that went has none
        blocks = find_blocks(network, inputs, names).get(container, {})
        while len(blocks) > keep:
            importances = _measure(context, network, list(blocks), batches, config)
            least = min(importances, key=lambda name: importances[name])
            remove_block(network.cpu(), least, blocks.pop(least), inputs, names)
            rounds.append(Round(container, least, importances))
            context.progress("prune", len(rounds), len(rounds) + len(blocks) - keep, f"without {least}")
    return rounds


def find_blocks(network: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> dict[str, dict[str, bool]]:
    """Blocks by container; for each, whether it takes just the one tensor."""
    calls: dict[str, list[bool | None]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], made: Any) -> None:
            calls.setdefault(name, []).append(_takes_one(arguments, keywords, made))

        return hook

    hooks = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in network.named_modules()
        if name and any(module.children()) and any(True for _ in module.parameters())
    ]
    checked_outputs(network.eval(), inputs, names)
    for hook in hooks:
        hook.remove()
    containers: dict[str, dict[str, bool]] = {}
    for name, _ in network.named_modules():
        seen = calls.get(name, [])
        if len(seen) == 1 and seen[0] is not None:
            containers.setdefault(name.rpartition(".")[0], {})[name] = seen[0]
    return containers


def matching_containers(
    network: nn.Module, inputs: Inputs, names: tuple[str, ...], config: DepthConfig
) -> dict[str, int]:
    """How many blocks stay in each container that the section names; a later pattern overrides an earlier one."""
    blocks = find_blocks(network, inputs, names)
    counts: dict[str, int] = {}
    for pattern, keep in config.keep.items():
        counts |= dict.fromkeys(_matching(pattern, blocks, f"{_KEY}.keep"), keep)
    for pattern, ratio in config.ratios.items():
        found = _matching(pattern, blocks, f"{_KEY}.ratios")
        counts |= {name: max(1, round(len(blocks[name]) * (1 - ratio))) for name in found}
    for name, keep in counts.items():
        if keep > len(blocks[name]):
            raise ConfigError(
                f"{_KEY}.keep: {name!r} has {len(blocks[name])} blocks that can go, and {keep} shall stay. "
                f"They are {', '.join(blocks[name])}."
            )
    return counts


def remove_block(
    network: nn.Module, name: str, takes_one: bool, inputs: Inputs, names: tuple[str, ...]
) -> None:
    """Replaces a block by nn.Identity, or takes one that is given more than a tensor out of its list.

    Raises PruningError when the network without it is not the network that passes it by.
    """
    with bypassed(network, name):
        expected = checked_outputs(network, inputs, names)
    container, _, leaf = name.rpartition(".")
    parent = network.get_submodule(container)
    if takes_one:
        parent._modules[leaf] = nn.Identity()
    elif isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        del parent._modules[leaf]
    else:
        raise PruningError(
            f"Block {name!r} is given more than one tensor and stands in no list, so it cannot be left out. "
            f"Put the blocks of {container!r} into an nn.ModuleList, or leave it out of {_KEY}."
        )
    found = checked_outputs(network, inputs, names)
    if not all(torch.allclose(found[key], expected[key], equal_nan=True) for key in expected):
        raise PruningError(
            f"Without block {name!r} the network is not the one that passes it by: its forward counts the blocks, "
            f"or pairs them with something. Leave {container!r} out of {_KEY}."
        )


@contextmanager
def bypassed(network: nn.Module, name: str) -> Iterator[None]:
    """Within, the block returns what it is given."""
    hook = network.get_submodule(name).register_forward_hook(lambda _module, arguments, _made: arguments[0])
    try:
        yield
    finally:
        hook.remove()


def _takes_one(arguments: tuple[Any, ...], keywords: Mapping[str, Any], made: Any) -> bool | None:
    """None when the call is not one that can be passed by."""
    if not arguments or not isinstance(arguments[0], Tensor) or not isinstance(made, Tensor):
        return None
    if made.shape != arguments[0].shape or made.dtype != arguments[0].dtype:
        return None
    return len(arguments) == 1 and not keywords


def _matching(pattern: str, containers: Mapping[str, Any], key: str) -> list[str]:
    found = [name for name in containers if fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, list(containers), n=3, cutoff=0.3) or list(containers)[:3]
        known = f"Nearest: {', '.join(map(repr, near))}." if near else "This network has none."
        raise ConfigError(
            f"{key}: {pattern!r} matches no module with blocks that can go. {known} A block returns a tensor of "
            "the shape it is given, has layers inside, and runs once."
        )
    return found


def _measure(
    context: StageContext,
    network: nn.Module,
    blocks: list[str],
    batches: list[tuple[Inputs, Any]],
    config: DepthConfig,
) -> dict[str, float]:
    if config.importance == "influence":
        return _influences(context, network, blocks, batches)
    whole = mean_loss(network, context, batches)
    worth = {}
    for name in blocks:
        with bypassed(network, name):
            worth[name] = mean_loss(network, context, batches) - whole
    return worth


def _influences(
    context: StageContext, network: nn.Module, blocks: list[str], batches: list[tuple[Inputs, Any]]
) -> dict[str, float]:
    """1 less the cosine between what a block is given and what it returns, the mean over samples.

    Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", where it is
    taken token by token; here over all values of a sample, which needs no channel axis.
    """
    sums = dict.fromkeys(blocks, 0.0)

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], made: Tensor) -> None:
            cosine = F.cosine_similarity(arguments[0].flatten(1), made.flatten(1))
            sums[name] += float((1 - cosine).mean())

        return hook

    hooks = [network.get_submodule(name).register_forward_hook(watch(name)) for name in blocks]
    network.to(context.device).eval()
    with torch.no_grad():
        for inputs, _ in batches:
            call_network(network, inputs, context.workload.output_names)
    for handle in hooks:
        handle.remove()
    return {name: total / len(batches) for name, total in sums.items()}
