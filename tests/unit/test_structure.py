import json

import pytest
import torch
from torch import nn

from jetway.tasks.errors import ArtifactError, PruningError
from jetway.tasks.structure import apply_structure, describe_structure, named_tensors, tied_names


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.num_heads = 4
        self.widths = (width, width)

    def forward(self, x):
        return x + self.norm(self.linear(x))


class Stack(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.aux = nn.Linear(width, 2)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) if self.aux is None else self.head(x) + self.aux(x).sum()


def rebuilt(network):
    record = json.loads(json.dumps(describe_structure(Stack(), network)))
    copy = apply_structure(Stack(), record)
    tensors = named_tensors(network)
    with torch.no_grad():
        for name, tensor in named_tensors(copy).items():
            tensor.copy_(tensors[name])
    return copy, record


def assert_same_outputs(network, copy):
    tokens = torch.arange(6)
    assert torch.equal(network(tokens), copy(tokens))


def test_an_unchanged_network_has_an_empty_record():
    assert describe_structure(Stack(), Stack()) == {
        "schema_version": 1, "attributes": {}, "tensors": {}, "identities": [], "removed": [], "ties": None,
    }  # fmt: skip


def test_record_carries_attributes_with_their_types():
    network = Stack()
    block = network.blocks[1]
    block.linear, block.norm = nn.Linear(8, 8), nn.LayerNorm(8, eps=0.5)
    block.num_heads, block.widths = 2, (6, 8)
    copy, record = rebuilt(network)
    assert record["attributes"] == {
        "blocks.1": {"num_heads": 2, "widths": [6, 8]},
        "blocks.1.norm": {"eps": 0.5},
    }
    assert copy.blocks[1].widths == (6, 8)
    assert_same_outputs(network, copy)


def test_what_a_call_leaves_behind_is_no_structure():
    network = Stack()
    network._hooks_installed = True
    network.blocks[0].depth_kept = 2
    record = describe_structure(Stack(), network)
    assert record["attributes"] == {"blocks.0": {"depth_kept": 2}}


def test_record_carries_narrower_layers_and_keeps_shared_weights_shared():
    network = Stack(width=6)
    copy, record = rebuilt(network)
    assert copy.blocks[0].norm.normalized_shape == (6,)
    assert copy.head.weight is copy.embed.weight
    assert record["tensors"]["embed.weight"] == [10, 6]
    assert_same_outputs(network, copy)


def test_record_carries_weights_that_are_no_longer_shared():
    network = Stack()
    network.head.weight = nn.Parameter(torch.rand(10, 8))
    copy, record = rebuilt(network)
    assert record["ties"] == {}
    assert tied_names(copy) == {}
    assert_same_outputs(network, copy)


def test_record_carries_removed_blocks():
    network = Stack()
    network.blocks[1] = nn.Identity()
    network.aux = None
    copy, record = rebuilt(network)
    assert record["identities"] == ["blocks.1"]
    assert record["removed"] == ["aux"]
    assert_same_outputs(network, copy)


def test_record_carries_a_shorter_list():
    network = Stack()
    del network.blocks[2]
    copy, record = rebuilt(network)
    assert record["removed"] == ["blocks.2"]
    assert len(copy.blocks) == 2
    assert_same_outputs(network, copy)


def test_a_frozen_parameter_stays_frozen():
    fresh = Stack()
    fresh.blocks[0].linear.weight.requires_grad_(False)
    record = describe_structure(Stack(), Stack(width=6))
    assert not apply_structure(fresh, record).blocks[0].linear.weight.requires_grad


def test_a_new_module_cannot_be_described():
    network = Stack()
    network.extra = nn.Linear(8, 8)
    with pytest.raises(PruningError, match="'extra' is not in the network"):
        describe_structure(Stack(), network)


def test_a_module_of_another_class_cannot_be_described():
    network = Stack()
    network.blocks[0].norm = nn.BatchNorm1d(8)
    with pytest.raises(PruningError, match=r"'blocks\.0\.norm' became a BatchNorm1d"):
        describe_structure(Stack(), network)


@pytest.mark.parametrize("key", ["attributes", "tensors", "identities", "removed"])
def test_a_record_of_another_network_is_an_artifact_error(key):
    record = describe_structure(Stack(), Stack())
    value = {"attributes": {"gone": {"a": 1}}, "tensors": {"gone.weight": [1]}}.get(key, ["gone.block"])
    with pytest.raises(ArtifactError, match="does not fit"):
        apply_structure(Stack(), record | {key: value})


def test_a_record_of_another_version_is_an_artifact_error():
    with pytest.raises(ArtifactError, match="schema version 9"):
        apply_structure(Stack(), {"schema_version": 9})
