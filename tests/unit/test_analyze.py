import pytest
import torch

from jetway.configs.schema import AnalyzeConfig
from jetway.tasks.analyze import _record_activations, analyze_network
from jetway.tasks.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def analysis(small_workload, make_context, tmp_path_factory):
    workload, steps = small_workload(), []
    folder = tmp_path_factory.mktemp("analysis")
    context = make_context(workload, folder, progress=lambda *step: steps.append(step))
    baseline = save_checkpoint(context.store, workload.network(), structure=None)
    output = analyze_network(context, baseline, AnalyzeConfig(latency_runs=3))
    return context.store, output, steps


def test_totals_are_those_of_the_network(analysis):
    store, output, _ = analysis
    table = store.load_json(output.handle)
    # 3→16 stem, 16→32→32→16 bottleneck on 8x8, 64→5 classifier.
    macs = 64 * (3 * 16 * 9 + 16 * 32 + 32 * 9 + 32 * 16) + 64 * 5
    assert table["totals"]["macs"] == output.metrics["macs"] == macs
    params = 3 * 16 * 9 + 2 * 16 + (16 * 32 + 32) + 64 + (32 * 9 + 32) + 64 + (32 * 16 + 16) + (64 * 5 + 5)
    assert table["totals"]["params"] == output.metrics["params"] == params
    buffers = 2 * 4 * (16 + 32 + 32) + 3 * 8
    assert output.metrics["weight_bytes"] == 4 * params + buffers


def test_rows_add_up_and_say_where_they_were_measured(analysis):
    store, output, _ = analysis
    table = store.load_json(output.handle)
    rows = {row["module"]: row for row in table["modules"]}
    for key in ("params", "macs", "weight_bytes", "activation_bytes"):
        assert sum(row[key] for row in rows.values()) == table["totals"][key], key
    assert sum(row["latency_share"] for row in rows.values()) == pytest.approx(1)
    assert all(row["latency_ms"] >= 0 for row in rows.values())
    assert "host CPU" in table["measured_on"]
    assert rows["expand.0"]["output_shape"] == [1, 32, 8, 8]
    assert rows["expand.0"]["activation_bytes"] == 32 * 64 * 4
    # The widest layers take and give 32 channels.
    assert table["totals"]["peak_activation_bytes"] == 2 * 32 * 64 * 4


def test_chart_is_a_png(analysis):
    store, output, _ = analysis
    chart = output.files["analysis.png"]
    assert store.open(chart).read_bytes().startswith(b"\x89PNG")
    assert chart.parents == output.handle.parents


def test_progress_counts_the_runs(analysis):
    _, _, steps = analysis
    assert steps[-1][:3] == ("analyze", 6, 6)


def test_hooks_are_gone_after_a_failure():

    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError):
        _record_activations(network, {"x": torch.ones(1, 3)})
    assert not network[0]._forward_hooks
