"""An exponential moving average of a network's weights over the steps of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of the parameters of ``network``; its buffers stay the network's own.

    The decay grows from 0.1 to ``decay`` over the first steps, as min(decay, (1 + step) / (10 + step)), so that
    where training started from is soon forgotten. (Polyak & Juditsky 1992; the warm-up as in TensorFlow.)
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay, self.steps = network, decay, 0
        self.values = {name: value.detach().clone() for name, value in self._parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights as they are after a step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, value in self._parameters():
            self.values[name].lerp_(value.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the network has the averaged weights."""
        own = {name: value.detach().clone() for name, value in self._parameters()}
        self._set(self.values)
        try:
            yield
        finally:
            self._set(own)

    def state(self) -> dict[str, Tensor | int]:
        return {**self.values, "": self.steps}

    def restore(self, state: dict[str, Tensor | int]) -> None:
        """Takes up what ``state`` gave."""
        self.steps = int(state[""])
        for name, value in self.values.items():
            value.copy_(torch.as_tensor(state[name]))

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, value in self._parameters():
            value.copy_(values[name])

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.network.named_parameters() if value.is_floating_point()]
