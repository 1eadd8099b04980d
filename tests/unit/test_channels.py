"""Which channels hang together where one tensor weighs the places of another."""

import copy

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
)
from jetway.tasks.dependencies import trace_dependencies
from jetway.tasks.errors import PruningError


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


class C2f(nn.Module):
    """Half of the channels passes a bottleneck, whose input and output are both joined, as in YOLOv8."""

    def __init__(self, inputs, channels, outputs):
        super().__init__()
        self.cv1 = nn.Conv2d(inputs, 2 * channels, 1)
        self.m = nn.Conv2d(channels, channels, 3, padding=1)
        self.cv2 = nn.Conv2d(3 * channels, outputs, 1)

    def parts(self, features):
        return list(features.chunk(2, 1))

    def forward(self, image):
        parts = self.parts(self.cv1(image).relu())
        parts.append(parts[-1] + self.m(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SplitByLength(C2f):
    def parts(self, features):
        return list(features.split(features.shape[1] // 2, dim=-3))


class UsedInTurn(C2f):
    """The part that comes second is used first."""

    def forward(self, image):
        first, second = self.parts(self.cv1(image).relu())
        return self.cv2(torch.cat([self.m(second), second, first], dim=1))


class BesideConstants(C2f):
    """What is joined begins with channels that no layer makes."""

    def __init__(self, inputs, channels, outputs):
        super().__init__(inputs, channels, outputs)
        self.cv2 = nn.Conv2d(3 * channels + 2, outputs, 1)

    def forward(self, image):
        parts = self.parts(self.cv1(image).relu())
        parts.append(parts[-1] + self.m(parts[-1]))
        return self.cv2(torch.cat([torch.ones_like(image[:, :2]), *parts], 1))


class WithEmpty(C2f):
    def forward(self, image):
        parts = self.parts(self.cv1(image).relu())
        parts.append(parts[-1] + self.m(parts[-1]))
        return self.cv2(torch.cat([torch.empty(0), *parts], axis=1))


@pytest.mark.parametrize("kind", [C2f, SplitByLength, UsedInTurn, BesideConstants, WithEmpty])
def test_halves_of_a_split_lose_the_same_channels(kind):
    torch.manual_seed(0)
    network = kind(3, 16, 4)
    before = copy.deepcopy(network)
    candidates = pruned_by_half(network)
    first = next(candidate for candidate in candidates if candidate.root == "cv1")
    assert (first.channels, first.blocks) == (32, 2)
    assert [network.cv1.out_channels, network.m.in_channels, network.m.out_channels] == [16, 8, 8]
    with torch.no_grad():
        gone = torch.argsort(first.scores)[:8]
        for layer, channels in [(before.cv1, gone), (before.cv1, gone + 16), (before.m, gone)]:
            if layer is before.cv1 or kind is not UsedInTurn:
                layer.weight[channels], layer.bias[channels] = 0, 0
        if kind is UsedInTurn:
            other = next(candidate for candidate in candidates if candidate.root == "m")
            gone = torch.argsort(other.scores)[:8]
            before.m.weight[gone], before.m.bias[gone] = 0, 0
    image = torch.randn(1, 3, 12, 12)
    assert torch.allclose(network(image), before(image), atol=1e-6)


class Shuffled(nn.Module):
    """Halves change places after what two layers made was joined: one of them alone would move the middle."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(32, 4, 1)

    def forward(self, image):
        features = self.stem(image)
        first, second = torch.cat([features, self.conv(features)], dim=1).chunk(2, dim=1)
        return self.last(torch.cat([second, first], dim=1))


def test_a_cut_that_would_move_where_channels_are_split_is_refused():
    with pytest.raises(PruningError, match=r"Pruning '(stem|conv)' would move the places"):
        pruned_by_half(Shuffled())


def test_a_part_that_is_not_used_hinders_nothing():
    network = C2f(3, 16, 4)
    network.cv2 = nn.Conv2d(16, 4, 1)
    network.forward = lambda image: network.cv2(network.m(network.parts(network.cv1(image))[1]))
    pruned_by_half(network)
    assert (network.cv1.out_channels, network.m.in_channels) == (16, 8)


def test_blocks_in_blocks_are_followed_in_time():
    """Torch-Pruning's own search takes twice as long for each block; for ten in ten, longer than anyone waits."""
    nested = C2f(16, 16, 16)
    for _ in range(10):
        outer = C2f(16, 16, 16)
        outer.m, nested = nested, outer
    network = nn.Sequential(nn.Conv2d(3, 16, 1), nested, nn.Conv2d(16, 4, 1))
    pruned_by_half(network)
    assert network[0].out_channels == 8
