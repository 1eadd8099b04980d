"""Which channels hang together where one tensor weighs the places of another."""

import pytest
import torch
from torch import nn

from jetway.configs.schema import Importance
from jetway.tasks.channels import (
    Limits,
    apply_cuts,
    find_candidates,
    make_importance,
    plan_cuts,
    trace_dependencies,
)


class SpatialAttention(nn.Module):
    """One weight for each place of 32 channels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3)
        self.gate = nn.Conv2d(32, 1, 1)
        self.last = nn.Conv2d(32, 4, 1)

    def forward(self, image):
        features = self.first(image)
        return self.last(features * self.gate(features).sigmoid())


class Lifted(SpatialAttention):
    """Weights whose own 8 channels have become places, which constant indices pick from."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(32, 8, 1)
        self.head = nn.Linear(32, 4)

    def forward(self, image):
        features = self.first(image)
        weights = self.gate(features).flatten(2).transpose(1, 2).softmax(dim=2).flatten(1)
        picked = weights.index_select(1, torch.arange(0, weights.shape[1], 8))[..., None]
        return self.head(features.flatten(2).transpose(1, 2) * picked)


class SqueezeExcite(SpatialAttention):
    """One weight for each channel, the same in all places."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(32, 32, 1)

    def forward(self, image):
        features = self.first(image)
        return self.last(features * self.gate(features.mean(dim=(2, 3), keepdim=True)).sigmoid())


def pruned_by_half(network):
    inputs = {"image": torch.randn(1, 3, 12, 12)}
    graph = trace_dependencies(network, inputs, ("output",))
    candidates = find_candidates(network, graph, make_importance(Importance.L2), frozenset())
    limits = Limits(round_to=8, max_pruning_ratio=0.9, initial={c.root: c.channels for c in candidates})
    apply_cuts(network, inputs, ("output",), plan_cuts(candidates, 0.5, {}, limits, ranked_globally=False))
    network(inputs["image"])
    return candidates


@pytest.mark.parametrize(("network", "gates"), [(SpatialAttention(), 1), (Lifted(), 8)])
def test_weights_of_places_keep_their_channels_and_set_the_others_free(network, gates):
    candidates = pruned_by_half(network)
    assert [candidate.members for candidate in candidates] == [("first",)]
    assert (network.first.out_channels, network.gate.in_channels, network.gate.out_channels) == (
        16,
        16,
        gates,
    )


def test_weights_of_channels_lose_them_together():
    network = SqueezeExcite()
    pruned_by_half(network)
    assert (network.first.out_channels, network.gate.out_channels) == (16, 16)
