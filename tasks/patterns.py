"""Patterns of the prune section: globs over names of modules and parameters."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from jetway.tasks.attention import find_attention
from jetway.tasks.errors import ConfigError


def prunable_names(network: nn.Module) -> list[str]:
    """What patterns of the prune section may name: modules and parameters."""
    return [name for name, _ in (*network.named_modules(), *network.named_parameters()) if name]


def matching_names(patterns: Iterable[str], names: Sequence[str], key: str) -> dict[str, list[str]]:
    """Names that each pattern matches, with all below them. Raises ConfigError with the nearest names."""
    matches = {pattern: [name for name in names if fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, found in matches.items():
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
            raise ConfigError(
                f"{key}: {pattern!r} matches no module or parameter of the network. "
                f"Nearest: {', '.join(near)}. Patterns are globs over whole names, like 'layer4.*'."
            )
    return {
        pattern: [name for name in names if any(name == top or name.startswith(f"{top}.") for top in found)]
        for pattern, found in matches.items()
    }


def matching_attention(patterns: Iterable[str], network: nn.Module, key: str) -> dict[str, list[str]]:
    """Attention modules that each pattern matches. Raises ConfigError where one matches none that can lose heads."""
    able = [attention.name for attention in find_attention(network)]
    matches = {pattern: [name for name in able if fnmatchcase(name, pattern)] for pattern in patterns}
    known = f"These can: {', '.join(able)}." if able else "This network has none."
    for pattern, found in matches.items():
        if not found:
            raise ConfigError(
                f"{key}: {pattern!r} matches no attention that can lose whole heads. {known} It needs an attribute "
                "num_heads, projections qkv or q, k, v, and one linear layer behind them inside the same module; "
                "the heads of nn.MultiheadAttention are as wide together as its embedding, so prune its width."
            )
    return matches
