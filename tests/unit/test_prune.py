import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jetway.configs.schema import (
    DistillationConfig,
    FinetuneConfig,
    Importance,
    PruneConfig,
)
from jetway.tasks.channels import (
    Limits,
    apply_cuts,
    find_candidates,
    make_importance,
    plan_cuts,
)
from jetway.tasks.checkpoint import checkpoint_record, load_network, save_checkpoint
from jetway.tasks.dependencies import trace_dependencies
from jetway.tasks.errors import ConfigError, PruningError
from jetway.tasks.importance import average_squared_gradients
from jetway.tasks.macs import total_macs
from jetway.tasks.patterns import matching_names
from jetway.tasks.prune import prune_inputs, prune_network
from jetway.tasks.stage import stage_key

USER_PROJECT = Path(__file__).parent / "user_project"
PRUNABLE = [
    "Residual",
    "Grouped",
    "Vit",
    "VitChunk",
    "VitSeparate",
    "Swin",
    "SwinFunctional",
    "Merging",
    "Masked",
    "Multihead",
    "Tokens",
]
DEPTH = {
    "Swin": {"depth": {"keep": {"blocks": 2}}, "head_ratio": 0.25},
    "Masked": {"depth": {"keep": {"blocks": 2}}},
}


@pytest.fixture
def start(small_workload, make_context, tmp_path):
    """Makes a context and a baseline checkpoint of one of the small networks."""

    def make(network, prepare=None):
        context = make_context(small_workload(network=network), tmp_path)
        module = context.workload.network().eval()
        if prepare:
            prepare(module)
        return context, save_checkpoint(context.store, module, structure=None)

    return make


def pruned(context, baseline, **config):
    return prune_network(context, baseline, PruneConfig(**config), FinetuneConfig(epochs=1))


def reload(context, output):
    return load_network(context.workload, output.handle, context.store)


FRESH_PROCESS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from jetway.configs.schema import WorkloadConfig
from jetway.tasks.artifacts import Checkpoint
from jetway.tasks.checkpoint import load_network
from jetway.tasks.store import Store
from jetway.tasks.workload import load_workload

torch.set_num_threads(1)
request = json.loads(sys.argv[1])
outputs = {}
for name, handle in request["handles"].items():
    config = WorkloadConfig(class_path="small_networks:SmallWorkload", options={"network": name})
    workload = load_workload(config, search_path=[Path(request["project"])])
    network = load_network(workload, Checkpoint.model_validate(handle), Store(Path(request["store"])))
    with torch.no_grad():
        outputs[name] = network(load_file(request["inputs"])[name])
save_file(outputs, request["outputs"])
"""


def test_pruned_networks_give_the_same_outputs_in_a_fresh_process(start, tmp_path):
    handles, inputs, expected = {}, {}, {}
    for name in PRUNABLE:
        context, baseline = start(name)
        handle = pruned(context, baseline, **DEPTH.get(name, {})).handle
        handles[name] = handle.model_dump()
        inputs[name] = torch.stack([context.workload.evaluation_data()[i][0]["x"] for i in range(4)])
        with torch.no_grad():
            expected[name] = load_network(context.workload, handle, context.store)(inputs[name])
    save_file(inputs, tmp_path / "inputs.safetensors")
    request = {
        "handles": handles,
        "project": str(USER_PROJECT),
        "store": str(tmp_path / "store"),
        "inputs": str(tmp_path / "inputs.safetensors"),
        "outputs": str(tmp_path / "outputs.safetensors"),
    }
    command = [sys.executable, "-W", "error", "-c", FRESH_PROCESS, json.dumps(request)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = load_file(tmp_path / "outputs.safetensors")
    for name in PRUNABLE:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("network", PRUNABLE)
def test_prune_halves_every_kind_of_network(start, network):
    context, baseline = start(network)
    output = pruned(context, baseline, pruning_ratio=0.5)
    record = checkpoint_record(context.store.open(output.handle)).structure
    assert output.metrics["macs_ratio"] < 0.65
    assert len(json.dumps(record)) < 500 + 100 * len(record["tensors"])
    assert reload(context, output)(context.workload.example_inputs()["x"]).shape == (1, 5)
    table = context.store.load_json(output.files["pruning.json"])
    assert sum(row["macs_after"] for row in table["modules"]) <= output.metrics["macs"]
    assert sum(row["params_after"] for row in table["modules"]) == output.metrics["params"]


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("importance", list(Importance))
def test_prune_by_every_importance(start, importance, scope):
    context, baseline = start("Residual")
    output = pruned(context, baseline, importance=importance, scope=scope, round_to=2)
    assert 0.1 < output.metrics["macs_ratio"] < 0.8


def silence(weight, bias, channels):
    with torch.no_grad():
        weight[channels] = 0
        if bias is not None:
            bias[channels] = 0


def test_prune_takes_the_silent_channels_of_a_residual_network_and_nothing_changes(start):
    dead, dead_inner = [1, 2, 5, 7, 8, 11, 12, 15], list(range(0, 32, 2))

    def prepare(network):
        # A channel of the sum is silent when both branches are.
        silence(network.stem[0].weight, None, dead)
        silence(network.stem[1].weight, network.stem[1].bias, dead)
        silence(network.project.weight, network.project.bias, dead)
        for block in (network.expand, network.depthwise):
            silence(block[0].weight, block[0].bias, dead_inner)
            silence(block[1].weight, block[1].bias, dead_inner)

    context, baseline = start("Residual", prepare)
    x = context.workload.collate([context.workload.evaluation_data()[i] for i in range(8)])[0]["x"]
    before = load_network(context.workload, baseline, context.store)(x)
    output = pruned(context, baseline, pruning_ratio=0.5, importance="l1")
    network = reload(context, output)
    assert torch.allclose(network(x), before, atol=1e-6)
    assert network.stem[0].out_channels == 8
    assert network.depthwise[0].groups == 16


def test_prune_takes_the_same_channels_of_every_group_of_a_grouped_convolution(start):
    def prepare(network):
        network.norm = torch.nn.Identity()
        silence(
            network.grouped.weight,
            network.grouped.bias,
            [8 * group + i for group in range(4) for i in (0, 3)],
        )
        silence(network.stem.weight, network.stem.bias, [8 * group + i for group in range(4) for i in (1, 6)])

    context, _ = start("Grouped")
    network = context.workload.network().eval()
    prepare(network)
    inputs = context.workload.example_inputs()
    before = network(inputs["x"])
    graph = trace_dependencies(network, inputs, ["logits"])
    candidates = find_candidates(network, graph, make_importance(Importance.L2), frozenset({"up"}))
    limits = Limits(round_to=4, max_pruning_ratio=0.9, initial={c.root: c.channels for c in candidates})
    cuts = plan_cuts(candidates, 0.25, {}, limits, ranked_globally=False)
    apply_cuts(network, inputs, ["logits"], cuts)
    assert network.grouped.weight.shape == (24, 6, 3, 3)
    assert torch.allclose(network(inputs["x"]), before, atol=1e-6)


@pytest.mark.parametrize("network", ["Vit", "VitChunk", "VitSeparate"])
def test_prune_keeps_attention_heads_apart(start, network):
    dead = [head * 8 + dim for head in range(4) for dim in (2, 5)]

    def prepare(module):
        attention = module.attn
        if network == "VitSeparate":
            for layer in (attention.q, attention.k, attention.v):
                silence(layer.weight, layer.bias, dead)
        else:
            rows = [32 * part + channel for part in range(3) for channel in dead]
            silence(attention.qkv.weight, attention.qkv.bias, rows)

    context, baseline = start(network, prepare)
    x = context.workload.example_inputs()["x"]
    before = load_network(context.workload, baseline, context.store)(x)
    keep_rest = {"patch": 0.0, "mlp.*": 0.0, "attn.proj": 0.0, "norm*": 0.0}
    output = pruned(
        context, baseline, pruning_ratio=0.25, pruning_ratios=keep_rest, importance="l1", round_to=4
    )
    module = reload(context, output)
    assert (module.attn.num_heads, module.attn.head_dim) == (4, 6)
    assert module.attn.proj.in_features == 24
    assert torch.allclose(module(x), before, atol=1e-5)


def rows_of_heads(heads, dim, width, parts):
    return [width * part + head * dim + i for part in range(parts) for head in heads for i in range(dim)]


@pytest.mark.parametrize("network", ["Vit", "VitSeparate", "Swin", "SwinFunctional"])
def test_prune_takes_the_silent_heads_as_a_whole_and_nothing_changes(start, network):
    swin = network.startswith("Swin")
    heads, dead = (8, [1, 6]) if swin else (4, [2])
    dim = 32 // heads

    def prepare(module):
        for attention in [block.attn for block in module.blocks] if swin else [module.attn]:
            layers = [attention.q, attention.k, attention.v] if network == "VitSeparate" else [attention.qkv]
            for layer in layers:
                silence(layer.weight, layer.bias, rows_of_heads(dead, dim, 32, 3 // len(layers)))

    context, baseline = start(network, prepare)
    x = context.workload.evaluation_data().inputs[:4]
    before = load_network(context.workload, baseline, context.store)(x)
    output = pruned(context, baseline, pruning_ratio=0.0, head_ratio=0.25, importance="l1")
    module = reload(context, output)
    attention = module.blocks[3].attn if swin else module.attn
    assert (attention.num_heads, attention.proj.in_features) == (heads - len(dead), 32 - dim * len(dead))
    assert torch.allclose(module(x), before, atol=1e-5)
    row = context.store.load_json(output.files["pruning.json"])["attention"][-1]
    assert (row["heads_before"], row["heads_after"]) == (heads, heads - len(dead))
    assert row["head_dim_before"] == row["head_dim_after"] == dim


def test_prune_takes_heads_and_their_channels_and_the_embedding_by_ratios_of_their_own(start):
    context, baseline = start("Swin")
    ratios = {"patch": 0.25, "*.mlp.0": 0.5}
    config = {"pruning_ratios": ratios, "head_ratios": {"blocks.[01].attn": 0.25}, "head_dim_ratio": 0.5}
    module = reload(context, pruned(context, baseline, **config, round_to=2))
    assert [block.attn.num_heads for block in module.blocks] == [6, 6, 8, 8]
    assert [block.attn.proj.in_features for block in module.blocks] == [12, 12, 16, 16]
    assert [block.attn.relative_position_bias_table.shape[1] for block in module.blocks] == [6, 6, 8, 8]
    assert module.patch.out_channels == module.norm.weight.numel() == 24
    assert module.blocks[2].mlp[0].out_features == 32


def test_heads_go_in_steps_to_where_one_step_ends(start):
    context, baseline = start("Swin")
    config = {"head_ratio": 0.5, "pruning_ratio": 0.5, "round_to": 2}
    whole, stepped = (pruned(context, baseline, **config, iterative_steps=steps) for steps in (1, 3))
    assert stepped.metrics["macs"] == whole.metrics["macs"]
    assert [block.attn.num_heads for block in reload(context, stepped).blocks] == [4] * 4


@pytest.mark.parametrize(
    ("network", "hint"), [("Swin", r"These can: blocks\.0\.attn"), ("Multihead", "has none")]
)
def test_head_ratios_that_match_no_attention_say_which_there_is(start, network, hint):
    context, baseline = start(network)
    with pytest.raises(ConfigError, match=rf"prune\.head_ratios: 'attn' .*{hint}"):
        pruned(context, baseline, head_ratios={"attn": 0.25})


def test_target_macs_ratio_is_reached_and_not_overshot(start):
    context, baseline = start("Residual")
    output = pruned(context, baseline, target_macs_ratio=0.6, round_to=1)
    network = reload(context, output)
    whole = load_network(context.workload, baseline, context.store)
    inputs = context.workload.example_inputs()
    assert output.metrics["macs_ratio"] == total_macs(network, inputs) / total_macs(whole, inputs)
    assert 0.5 < output.metrics["macs_ratio"] <= 0.6


def test_target_macs_ratio_out_of_reach_says_how_close(start):
    context, baseline = start("Residual")
    with pytest.raises(PruningError, match=r"asks for 0\.010 .* leaves 0\.\d+"):
        pruned(context, baseline, target_macs_ratio=0.01, max_pruning_ratio=0.5)


def test_round_to_and_max_pruning_ratio_hold(start):
    context, baseline = start("Residual")
    network = reload(context, pruned(context, baseline, pruning_ratio=0.9, round_to=4, max_pruning_ratio=0.6))
    assert network.stem[0].out_channels == 8  # 40 % of 16 is 6.4
    assert network.expand[0].out_channels == 16  # 40 % of 32 is 12.8


def test_ratios_of_single_modules_and_ignored_layers(start):
    context, baseline = start("Residual")
    config = {"pruning_ratios": {"expand.*": 0.75}, "ignored_layers": ("stem*",), "round_to": 8}
    network = reload(context, pruned(context, baseline, **config))
    assert network.expand[0].out_channels == 8
    assert network.stem[0].out_channels == network.project.out_channels == 16


@pytest.mark.parametrize("key", ["ignored_layers", "pruning_ratios"])
def test_pattern_that_matches_nothing_names_the_nearest(start, key):
    context, baseline = start("Residual")
    value = ("expnd",) if key == "ignored_layers" else {"expnd": 0.5}
    with pytest.raises(ConfigError, match=rf"prune\.{key}: 'expnd' .*Nearest: expand"):
        pruned(context, baseline, **{key: value})


def test_matching_names_covers_what_is_below():
    names = ["layer1", "layer1.conv", "layer10", "head"]
    assert matching_names(["layer1"], names, "k") == {"layer1": ["layer1", "layer1.conv"]}


def test_fixed_width_names_the_module_that_fails(start):
    context, baseline = start("FixedWidth")
    with pytest.raises(PruningError, match=r"module 'body' raises .*prune\.ignored_layers"):
        pruned(context, baseline)


def test_network_without_gradients_is_a_pruning_error(start):
    context, baseline = start("Untraceable")
    with pytest.raises(PruningError, match="carry no gradient"):
        pruned(context, baseline)


def test_attention_of_another_making_stays_whole_and_is_named(start, caplog):
    context, baseline = start("OtherAttention")
    network = reload(context, pruned(context, baseline))
    assert network.attn.asked.weight.shape == (32, 32)
    assert network.up.out_features == 32
    assert "'attn' has heads" in caplog.text
    assert "''" not in caplog.text


def test_layers_whose_channels_cannot_be_followed_stay_whole_and_are_named(start, caplog):
    context, baseline = start("Shuffled")
    network = reload(context, pruned(context, baseline))
    assert (network.stem.out_channels, network.conv.out_channels, network.mix.out_channels) == (16, 16, 8)
    assert "stay whole, as views hide which channel is which: conv, stem" in caplog.text


def test_nothing_left_to_prune_is_a_pruning_error(start):
    context, baseline = start("Residual")
    with pytest.raises(PruningError, match="Nothing can be pruned"):
        pruned(context, baseline, ignored_layers=("*",))


def test_hessian_importance_sums_the_squared_gradient_of_every_sample(start):
    context, _ = start("Residual")
    network = context.workload.network()
    expected = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    data = context.workload.train_data()
    network.eval()
    for inputs, label in (data[i] for i in range(len(data))):
        network.zero_grad()
        torch.nn.functional.cross_entropy(network(inputs["x"][None]), torch.tensor([label])).backward()
        for name, parameter in network.named_parameters():
            expected[name] += parameter.grad**2 / len(data)
    average_squared_gradients(network, context, samples=len(data))
    for name, parameter in network.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-9), name


def test_slimming_comes_before_the_cut_and_is_reported(start):
    context, baseline = start("Residual")
    slimming = {"epochs": 2, "batch_size": 16, "learning_rate": 5e-2, "strength": 0.1}
    output = pruned(context, baseline, slimming=slimming, importance="bn_scale", round_to=1)
    told = context.store.load_json(output.files["pruning.json"])["slimming"]
    assert told["best_epoch"] == 2
    assert len(told["sparse_scales_ratio"]) == 2


def test_steps_finetune_in_between_and_end_where_one_step_does(start):
    context, baseline = start("Residual")
    whole = pruned(context, baseline, iterative_steps=1)
    texts = []
    context.progress = lambda stage, done, total, text="": texts.append(text)
    stepped = prune_network(
        context,
        baseline,
        PruneConfig(iterative_steps=2, finetune_epochs_between=1),
        FinetuneConfig(distillation=DistillationConfig()),
    )
    assert stepped.metrics["macs"] == whole.metrics["macs"]
    assert any("epoch 1/1" in text for text in texts)


def test_prune_twice_gives_the_same_checkpoint(start):
    context, baseline = start("Residual")
    first, second = (pruned(context, baseline, importance="taylor") for _ in range(2))
    assert first.handle == second.handle


def test_prune_key_holds_finetune_only_where_it_counts(start):
    context, baseline = start("Residual")

    def key(finetune, **config):
        return stage_key(context, "prune", [baseline], prune_inputs(PruneConfig(**config), finetune))

    slow, fast = FinetuneConfig(learning_rate=1e-4), FinetuneConfig(learning_rate=1e-2)
    assert key(slow) == key(fast)
    between = {"iterative_steps": 2, "finetune_epochs_between": 1}
    assert key(slow, **between) != key(fast, **between)
    assert key(slow) != key(slow, pruning_ratio=0.4)


def test_prune_leaks_no_network(start):
    context, baseline = start("Grouped")
    network = load_network(context.workload, baseline, context.store)
    graph = trace_dependencies(network, context.workload.example_inputs(), ["logits"])
    find_candidates(network, graph, make_importance(Importance.L2), frozenset())
    alive = weakref.ref(network)
    del network, graph
    gc.collect()
    assert alive() is None
