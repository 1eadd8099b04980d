"""Depth pruning: which blocks go, what it changes, and what cannot be asked for."""

import pytest
import torch
from torch import nn

from jetway.configs.schema import DepthConfig, FinetuneConfig, PruneConfig
from jetway.tasks.checkpoint import load_network, save_checkpoint
from jetway.tasks.depth import bypassed, find_blocks, remove_block
from jetway.tasks.errors import ConfigError, PruningError
from jetway.tasks.prune import prune_network


@pytest.fixture
def start(small_workload, make_context, tmp_path):
    def make(network, silent=()):
        context = make_context(small_workload(network=network), tmp_path)
        module = context.workload.network().eval()
        for name in silent:
            layer = module.get_submodule(name)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        return context, save_checkpoint(context.store, module, structure=None)

    return make


def pruned(context, baseline, **depth):
    config = PruneConfig(pruning_ratio=0.0, depth=DepthConfig(**depth))
    return prune_network(context, baseline, config, FinetuneConfig())


def reload(context, output):
    return load_network(context.workload, output.handle, context.store)


def test_the_block_goes_without_which_the_loss_is_lowest(start):
    context, baseline = start("Swin", ["blocks.1.attn.proj", "blocks.1.mlp.2"])
    x, labels = (context.workload.train_data().inputs, context.workload.train_data().labels)
    network = load_network(context.workload, baseline, context.store)
    losses = {}
    with torch.no_grad():
        whole = nn.functional.cross_entropy(network(x), labels)
        for i in range(4):
            with bypassed(network, f"blocks.{i}"):
                losses[f"blocks.{i}"] = float(nn.functional.cross_entropy(network(x), labels) - whole)
    output = pruned(context, baseline, keep={"blocks": 3}, importance="loss")
    (told,) = context.store.load_json(output.files["pruning.json"])["depth"]
    assert told["importances"] == pytest.approx(losses, abs=1e-5)
    assert losses["blocks.1"] == pytest.approx(0.0, abs=1e-6)
    assert told["removed"] == min(losses, key=lambda name: losses[name])


def test_the_blocks_that_do_nothing_go_and_nothing_changes(start):
    silent = [f"blocks.{i}.{layer}" for i in (1, 2) for layer in ("attn.proj", "mlp.2")]
    context, baseline = start("Swin", silent)
    x = context.workload.evaluation_data().inputs[:4]
    before = load_network(context.workload, baseline, context.store)(x)
    output = pruned(context, baseline, keep={"blocks": 2}, importance="influence")
    network = reload(context, output)
    assert [type(block) is nn.Identity for block in network.blocks] == [False, True, True, False]
    assert torch.equal(network(x), before)
    assert 0.4 < output.metrics["macs_ratio"] < 0.6
    report = context.store.load_json(output.files["pruning.json"])
    assert [each["removed"] for each in report["depth"]] == ["blocks.1", "blocks.2"]
    assert report["depth"][0]["importances"]["blocks.1"] == pytest.approx(0.0, abs=1e-6)
    assert report["depth"][0]["importances"]["blocks.0"] > 1e-3
    gone = next(row for row in report["modules"] if row["module"] == "blocks.1.mlp.2")
    assert gone["params_after"] == gone["macs_after"] == 0


def test_a_block_that_takes_a_mask_goes_out_of_its_list(start):
    context, baseline = start("Masked", ["blocks.0.down"])
    network = reload(context, pruned(context, baseline, ratios={"blocks": 0.3}))
    assert [name for name, _ in network.blocks.named_children()] == ["1", "2"]


def test_channels_are_pruned_in_what_is_left(start):
    context, baseline = start("Swin")
    config = PruneConfig(depth=DepthConfig(keep={"blocks": 3}), target_macs_ratio=0.3, round_to=2)
    output = prune_network(context, baseline, config, FinetuneConfig())
    assert 0.2 < output.metrics["macs_ratio"] <= 0.3
    assert sum(type(block) is nn.Identity for block in reload(context, output).blocks) == 1


def test_blocks_are_found_by_what_they_return(small_workload):
    workload = small_workload(network="Swin")
    found = find_blocks(workload.network(), workload.example_inputs(), workload.output_names)
    assert found["blocks"] == dict.fromkeys([f"blocks.{i}" for i in range(4)], True)
    assert "" not in found


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"blcks": 2}, r"prune\.depth\.keep: 'blcks' matches no module .*Nearest: 'blocks'"),
        ({"blocks": 5}, r"'blocks' has 4 blocks that can go, and 5 shall stay"),
    ],
)
def test_what_cannot_be_kept_says_what_there_is(start, keep, message):
    context, baseline = start("Swin")
    with pytest.raises(ConfigError, match=message):
        pruned(context, baseline, keep=keep)


class Counted(nn.Module):
    """Weighs what each block gives by its place in the list."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x):
        return sum(block(x) / number for number, block in enumerate(self.blocks, 1))


def test_a_network_that_counts_its_blocks_is_refused():
    network = Counted().eval()
    with pytest.raises(PruningError, match=r"Without block 'blocks\.0' the network is not the one"):
        remove_block(network, "blocks.0", False, {"x": torch.randn(1, 4)}, ("y",))
