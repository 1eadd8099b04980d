"""Feature distillation: what modules inside of a network return follows what they return in its teacher."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jetway.tasks.errors import ConfigError

KEY = "distillation.features"


class Features:
    """What the named modules of a network returned in its last call."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.seen: dict[str, Tensor] = {}
        self._hooks = [network.get_submodule(name).register_forward_hook(self._keep(name)) for name in names]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, _arguments: Any, made: Any) -> None:
            if not isinstance(made, Tensor):
                raise ConfigError(
                    f"{KEY}: {name!r} returns a {type(made).__name__}, not one tensor. Name a module inside of it."
                )
            self.seen[name] = made

        return hook


def feature_names(patterns: Sequence[str], teacher: nn.Module, student: nn.Module) -> list[str]:
    """Modules that the patterns match and both networks have. Raises ConfigError for a pattern that matches none."""
    own, known = dict(student.named_modules()), [name for name, _ in teacher.named_modules() if name]
    matched: list[str] = []
    for pattern in patterns:
        found = [name for name in known if fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
            raise ConfigError(
                f"{KEY}: {pattern!r} matches no module of the baseline. Nearest: {', '.join(near)}."
            )
        matched += [name for name in found if name not in matched]
    both = [name for name in matched if name in own and type(own[name]) is not nn.Identity]
    if matched and not both:
        raise ConfigError(f"{KEY}: none of {', '.join(matched)} is left in the pruned network. Name others.")
    return both


def feature_loss(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """Distance of a network's features from its teacher's, the mean over modules; 0 where they agree.

    Of equal shapes the mean squared error, relative to the teacher's mean square (Romero et al. 2015, "FitNets").
    Where the student has fewer channels, the distance of the normalized maps of the channels' mean square
    (Zagoruyko & Komodakis 2017, "Paying More Attention to Attention"). Raises ConfigError for other shapes.
    """
    return torch.stack(
        [_distance(name, student[name].float(), teacher[name].float()) for name in student]
    ).mean()


def _distance(name: str, output: Tensor, taught: Tensor) -> Tensor:
    if output.shape == taught.shape:
        return F.mse_loss(output, taught) / taught.square().mean().clamp_min(torch.finfo(taught.dtype).tiny)
    axes = [axis for axis in range(1, taught.dim()) if output.shape[axis] != taught.shape[axis]]
    if output.dim() != taught.dim() or len(axes) != 1 or taught.dim() < 3:
        raise ConfigError(
            f"{KEY}: {name!r} returns {tuple(output.shape)} where the baseline's returns {tuple(taught.shape)}; "
            "only channels may be fewer, and something must be left without them. Name another module."
        )
    return (_energy_map(output, axes[0]) - _energy_map(taught, axes[0])).square().sum(dim=1).mean()


def _energy_map(features: Tensor, channel_axis: int) -> Tensor:
    return F.normalize(features.square().mean(dim=channel_axis).flatten(1), dim=1)
