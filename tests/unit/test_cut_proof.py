"""What a cut is proved by: joins, splits and views behind which channels are, or are not, where they seem to be."""

import pytest
import torch
from torch import nn

from jetway.configs.schema import Importance
from jetway.tasks.channels import Limits, find_candidates, make_importance, plan_cuts
from jetway.tasks.cut_proof import is_proven
from jetway.tasks.dependencies import trace_dependencies

INPUTS = {"image": torch.zeros(1, 3, 12, 12)}


class Network(nn.Module):
    def __init__(self, joined=32):
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 32, 1), nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(joined, 4, 1)

    def halves(self, image):
        return self.first(image).relu().chunk(2, 1)

    def forward(self, image):
        first, second = self.halves(image)
        return self.last(torch.cat([first, self.inner(second)], 1))


class Flattened(Network):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(32 * 144, 4)

    def forward(self, image):
        return self.last(self.first(image).flatten(1))


class ShuffledByViews(Network):
    """As in ShuffleNet."""

    def forward(self, image):
        first, second = self.halves(image)
        joined = torch.cat([first, self.inner(second)], 1)
        return self.last(joined.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))


class BesideTheImage(Network):
    """As in networks that are told of places."""

    def __init__(self):
        super().__init__(joined=35)

    def forward(self, image):
        return self.last(torch.cat([image, self.first(image)], 1))


class CutInPart(Network):
    """Some of the channels that are joined are never read."""

    def __init__(self):
        super().__init__(joined=24)
        self.inner = nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def forward(self, image):
        features = self.first(image)
        return self.last(torch.cat([features, self.inner(features)], 1)[:, :24])


class GroupedPart(Network):
    """Half of the channels passes a convolution of two groups: four blocks in all."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(16, 16, 3, padding=1, groups=2)


class Normalized(Network):
    """A norm over the channels changes with their number, which is no fault."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(1, 32)

    def forward(self, image):
        first, second = self.halves(image)
        return self.last(self.norm(torch.cat([first, second], 1)))


def proofs(network):
    """Of the cut of half of each layer's channels, by its first layer."""
    torch.manual_seed(0)
    network.eval()
    graph = trace_dependencies(network, INPUTS, ("output",))
    candidates = find_candidates(network, graph, make_importance(Importance.L2), frozenset())
    limits = Limits(round_to=1, max_pruning_ratio=0.9, initial={c.root: c.channels for c in candidates})
    cuts = plan_cuts(candidates, 0.5, {}, limits, ranked_globally=False)
    return {cut.root: is_proven(network, graph, INPUTS, ("output",), cut) for cut in cuts}


@pytest.mark.parametrize("network", [Network(), Flattened(), Normalized()])
def test_a_right_cut_is_proven(network):
    found = proofs(network)
    assert found["first"]
    assert all(found.values())


@pytest.mark.parametrize("network", [ShuffledByViews(), BesideTheImage(), CutInPart(), GroupedPart()])
def test_a_wrong_cut_is_found_out(network):
    assert not proofs(network)["first"]
