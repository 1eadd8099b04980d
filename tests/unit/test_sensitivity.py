"""Sensitivity: what is measured, what auto chooses by it, and that it is measured once."""

import pytest
import torch
from torch import nn

from jetway.configs.schema import FinetuneConfig, PruneConfig, QatConfig, SensitivityConfig, TrainConfig
from jetway.tasks.allocation import Point, allocate
from jetway.tasks.channels import find_candidates, make_importance
from jetway.tasks.checkpoint import load_network, save_checkpoint
from jetway.tasks.dependencies import trace_dependencies
from jetway.tasks.errors import ConfigError, PruningError, QuantizationError, WorkloadError
from jetway.tasks.load import load_baseline
from jetway.tasks.macs import total_macs
from jetway.tasks.prune import prune_network
from jetway.tasks.qat import quantize_ptq
from jetway.tasks.quantization import quantizable_layers
from jetway.tasks.score import Scorer
from jetway.tasks.sensitivity import (
    measure_int8,
    measure_pruning,
    pruning_sensitivity,
    with_chosen_layers,
)

SECTION = SensitivityConfig(samples=16)


@pytest.fixture(scope="module")
def trained(small_workload, make_context, tmp_path_factory):
    context = make_context(small_workload(), tmp_path_factory.mktemp("sensitivity"), reuse=True)
    torch.manual_seed(0)
    output = load_baseline(context, None, TrainConfig(epochs=8, batch_size=16, learning_rate=3e-3))
    return context, output.handle


def automatic(**changes):
    return PruneConfig(**{"pruning_ratio": "auto", "target_macs_ratio": 0.5, "round_to": 2} | changes)


@pytest.fixture(scope="module")
def measured(trained):
    return measure_pruning(*trained, automatic(), SECTION)


def test_every_group_is_pruned_alone_at_every_ratio(trained, measured):
    context, baseline = trained
    report = context.store.load_json(measured.handle)
    network, inputs = (
        load_network(context.workload, baseline, context.store),
        context.workload.example_inputs(),
    )
    graph = trace_dependencies(network, inputs, ["logits"])
    groups = [c.members[0] for c in find_candidates(network, graph, make_importance("l2"), frozenset())]
    assert [(row["module"], row["ratio"]) for row in report["rows"]] == [
        (group, ratio) for group in groups for ratio in (0.25, 0.5, 0.75)
    ]
    assert report["whole"]["metric"] == Scorer(context, 16)(network).metric
    assert report["measured_on"] == "16 samples of the calibration data, on the host"
    row = next(row for row in report["rows"] if "stem.0" in row["members"] and row["ratio"] == 0.5)
    assert row["kept"] == 8
    alone = {"ignored_layers": ("expand*",), "pruning_ratio": 0.5, "round_to": 2}
    output = prune_network(context, baseline, PruneConfig(**alone), FinetuneConfig())
    assert row["macs_ratio"] == pytest.approx(output.metrics["macs_ratio"])
    cut = load_network(context.workload, output.handle, context.store)
    assert row["metric"] == Scorer(context, 16)(cut).metric
    assert set(measured.files) == {"pruning_sensitivity.json", "pruning_sensitivity.png"}


def test_sensitivity_is_measured_once_and_finetuning_is_no_part_of_its_key(trained):
    context, baseline = trained
    context.finished.clear()
    for config in (automatic(), automatic(target_macs_ratio=0.4), automatic(importance="l1")):
        pruning_sensitivity.fn(context, baseline, config, SECTION)
    assert [stage.cached for stage in context.finished] == [False, True, False]


def test_automatic_ratios_reach_the_target_and_differ(trained, measured):
    context, baseline = trained
    output = prune_network(context, baseline, automatic(), FinetuneConfig(), measured.handle)
    assert 0.4 < output.metrics["macs_ratio"] <= 0.5
    told = context.store.load_json(output.files["pruning.json"])["allocated"]
    assert len(told) == 2
    network = load_network(context.workload, output.handle, context.store)
    inputs = context.workload.example_inputs()
    whole = load_network(context.workload, baseline, context.store)
    assert output.metrics["macs_ratio"] == total_macs(network, inputs) / total_macs(whole, inputs)


def test_automatic_ratios_spare_the_group_that_the_loss_needs(trained, measured):
    """The same curves, but for a group whose pruning is said to ruin the network."""
    context, baseline = trained
    report = context.store.load_json(measured.handle)
    for row in report["rows"]:
        row["loss_rise"] = 100.0 if "stem.0" in row["members"] else 0.0
    output = prune_network(
        context, baseline, automatic(target_macs_ratio=0.7), FinetuneConfig(), context.store.add_json(report)
    )
    network = load_network(context.workload, output.handle, context.store)
    assert network.stem[0].out_channels == 16
    assert network.expand[0].out_channels < 32


def test_a_ratio_of_ones_own_stands_beside_automatic_ones(trained, measured):
    context, baseline = trained
    config = automatic(pruning_ratios={"expand*": 0.25})
    network = load_network(
        context.workload,
        prune_network(context, baseline, config, FinetuneConfig(), measured.handle).handle,
        context.store,
    )
    assert network.expand[0].out_channels == 24


def test_automatic_ratios_out_of_reach_say_how_close(trained, measured):
    context, baseline = trained
    with pytest.raises(PruningError, match=r"asks for 0\.010 .*leave 0\.\d+.*Add larger"):
        prune_network(context, baseline, automatic(target_macs_ratio=0.01), FinetuneConfig(), measured.handle)
    with pytest.raises(ConfigError, match=r"needs prune\.target_macs_ratio and the sensitivity"):
        prune_network(context, baseline, automatic(), FinetuneConfig())


def test_auto_needs_a_target():
    with pytest.raises(ValueError, match="set that too"):
        PruneConfig(pruning_ratio="auto")


def test_allocate_takes_from_where_it_hurts_least():
    curves = {
        "cheap": [Point(0.5, 0.01, 0.2), Point(0.8, 0.02, 0.35)],
        "dear": [Point(0.5, 1.0, 0.2), Point(0.8, 9.0, 0.35)],
        "useless": [Point(0.5, 0.01, 0.0), Point(0.8, 0.5, 0.0)],
    }

    def macs_ratio(ratios):
        return 1 - 0.44 * ratios["cheap"] - 0.44 * ratios["dear"]

    found = allocate(curves, macs_ratio, 0.8)
    assert found["dear"] == found["useless"] == 0.0
    assert 0.79 < macs_ratio(found) <= 0.8
    more = allocate(curves, macs_ratio, 0.5)
    assert more["cheap"] == 0.8 > more["dear"] > 0.0
    assert allocate(curves, macs_ratio, 0.1) is None


def int8(context, checkpoint, **changes):
    config = QatConfig(calibration_samples=16, **changes)
    output = measure_int8(context, checkpoint, config, SECTION)
    return context.store.load_json(output.handle), config


def spoiled(context, baseline, layer, value):
    """The baseline with one weight of a layer so large that int8 has nothing left for the others."""
    network = load_network(context.workload, baseline, context.store)
    with torch.no_grad():
        weight = network.get_submodule(layer).weight
        weight[:, 0] = value
        # what it multiplies is always 0, so the float network stays what it is
        network.expand[1].weight[0] = network.expand[1].bias[0] = 0.0
        network.depthwise[1].weight[0] = network.depthwise[1].bias[0] = 0.0
    return save_checkpoint(context.store, network, structure=None)


def test_every_layer_is_int8_alone_and_left_out_alone(trained):
    context, baseline = trained
    report, _ = int8(context, baseline)
    network = load_network(context.workload, baseline, context.store)
    assert [row["module"] for row in report["rows"]] == quantizable_layers(network)
    assert {"drop_alone", "loss_rise_alone", "metric_without", "loss_without"} <= report["rows"][0].keys()
    assert "keep_float" not in report


def test_auto_keeps_the_one_layer_in_float_that_ruins_int8(trained):
    context, baseline = trained
    bad = spoiled(context, baseline, "project", 1e5)
    report, config = int8(context, bad, keep_float="auto", max_metric_drop=0.05)
    assert report["keep_float"] == ["project"]
    assert report["tried"][0]["drop"] > 0.05 >= report["drop"]
    assert max(report["rows"], key=lambda row: row["loss_rise_alone"])["module"] == "project"
    chosen = with_chosen_layers(config, report)
    assert chosen.keep_float == ("project",)
    output = quantize_ptq(context, bad, chosen)
    assert output.metrics["top1"] >= quantize_ptq(context, bad, QatConfig()).metrics["top1"]


def test_what_was_chosen_is_told(trained, measured):
    context, baseline = trained
    config = QatConfig(calibration_samples=16, keep_float="auto", max_metric_drop=0.5)
    (note,) = measure_int8(context, baseline, config, SECTION).notes
    assert "qat.keep_float auto keeps no layer in float. The drop of top1 on 16 samples" in note
    (told,) = prune_network(context, baseline, automatic(), FinetuneConfig(), measured.handle).notes
    assert "prune.pruning_ratio auto leaves 0.4" in told
    assert prune_network(context, baseline, PruneConfig(), FinetuneConfig()).notes == ()


def test_auto_keeps_nothing_in_float_where_int8_holds(trained):
    context, baseline = trained
    report, _ = int8(context, baseline, keep_float="auto", max_metric_drop=0.5)
    assert report["keep_float"] == []
    assert len(report["tried"]) == 1


def test_auto_that_finds_no_int8_says_so(trained, monkeypatch):
    context, baseline = trained
    monkeypatch.setattr(Scorer, "drop", lambda self, before, after: 1.0)
    with pytest.raises(
        QuantizationError, match=r"finds no layer that may be int8 within qat\.max_metric_drop"
    ):
        int8(context, baseline, keep_float="auto")


def test_calibration_data_without_targets_are_a_workload_error(trained):
    context, _ = trained
    workload = context.workload
    data = [({"x": workload.calibration_data()[i][0]["x"]}, None) for i in range(4)]

    class Untargeted(type(workload)):
        def calibration_data(self):
            return data

    context.workload = Untargeted()
    try:
        with pytest.raises(WorkloadError, match="needs targets as its evaluation data has"):
            Scorer(context, 4)(workload.network())
    finally:
        context.workload = workload
    assert isinstance(workload.network(), nn.Module)
