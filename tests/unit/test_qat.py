"""PTQ and QAT as stages: what they hand on, what they report, and what re-runs when the recipe changes."""

import pytest
import torch
from torch import nn

from jetway.configs.schema import DistillationConfig, QatConfig
from jetway.tasks.checkpoint import checkpoint_record, save_checkpoint
from jetway.tasks.errors import ConfigError
from jetway.tasks.qat import calibration_section, ptq, qat, quantize_ptq, train_qat
from jetway.tasks.quantization import load_quantized_network
from jetway.tasks.structure import describe_structure
from jetway.tasks.workload import Workload


class Halves(Workload):
    """Which half of an 8-vector has the larger sum; the network may be narrower than ``width``."""

    def __init__(self, width=16):
        self.width = width

    def network(self):
        return nn.Sequential(
            nn.Linear(8, self.width), nn.BatchNorm1d(self.width), nn.ReLU(), nn.Linear(self.width, 2)
        )

    def example_inputs(self):
        return {"x": torch.zeros(1, 8)}

    def _data(self, seed, count):
        x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
        return [({"x": row}, int(row[4:].sum() > row[:4].sum())) for row in x]

    def train_data(self):
        return self._data(0, 256)

    def calibration_data(self):
        return self._data(1, 64)

    def evaluation_data(self):
        return self._data(2, 128)

    def loss(self, outputs, target):
        return nn.functional.cross_entropy(outputs["output"], target)


@pytest.fixture
def ctx(make_context, tmp_path):
    return make_context(Halves(), tmp_path)


def checkpoint_of(ctx, network=None):
    network = network or ctx.workload.network()
    structure = describe_structure(ctx.workload.network(), network)
    return save_checkpoint(ctx.store, network.eval(), structure=structure, metadata={"stage": "pruned"})


def test_quantize_ptq_reports_metrics_and_lineage(ctx):
    floating = checkpoint_of(ctx)
    output = quantize_ptq(ctx, floating, QatConfig())
    assert output.handle.parents == (floating.sha256,)
    assert output.handle.metadata == {"stage": "pruned", "quantization": "ptq"}
    assert 0 <= output.metrics["top1"] <= 1
    assert checkpoint_record(ctx.store.open(output.handle)).quantization["quantizers"]


def test_quantize_ptq_gives_the_same_checkpoint_again(ctx):
    floating = checkpoint_of(ctx)
    assert quantize_ptq(ctx, floating, QatConfig()).handle == quantize_ptq(ctx, floating, QatConfig()).handle


def test_train_qat_gains_over_ptq_and_keeps_its_ranges(ctx):
    start = quantize_ptq(ctx, checkpoint_of(ctx), QatConfig())
    output = train_qat(ctx, start.handle, QatConfig(epochs=3, learning_rate=1e-2), None)
    history = ctx.store.load_json(output.files["qat_history.json"])["history"]
    assert history[0]["metrics"] == start.metrics
    assert output.metrics["top1"] > start.metrics["top1"]
    assert output.handle.metadata == {"stage": "pruned", "quantization": "qat"}
    before, after = (
        load_quantized_network(ctx.workload, handle, ctx.store) for handle in (start.handle, output.handle)
    )
    assert not torch.equal(before[0].weight, after[0].weight)
    assert torch.equal(before[0].input_quantizer.amax, after[0].input_quantizer.amax)


def test_quantization_carries_the_structure_of_a_pruned_network(ctx):
    narrow = Halves(width=12).network()
    start = quantize_ptq(ctx, checkpoint_of(ctx, narrow), QatConfig())
    output = train_qat(ctx, start.handle, QatConfig(epochs=1), None)
    assert load_quantized_network(ctx.workload, output.handle, ctx.store)[0].out_features == 12


def test_train_qat_follows_a_teacher_only_with_distillation(ctx):
    baseline = checkpoint_of(ctx)
    start = quantize_ptq(ctx, baseline, QatConfig()).handle
    config = QatConfig(epochs=1, learning_rate=1e-2)
    taught_config = config.model_copy(update={"distillation": DistillationConfig(weight=1.0)})
    alone = train_qat(ctx, start, config, baseline).handle
    taught = train_qat(ctx, start, taught_config, baseline).handle
    assert alone.parents == (start.sha256,)
    assert taught.parents == (start.sha256, baseline.sha256)
    assert alone != taught
    with pytest.raises(ConfigError, match="no teacher"):
        train_qat(ctx, start, taught_config, None)


def test_train_qat_trains_on_the_qat_data_alone(ctx, monkeypatch):
    def train_data():
        raise AssertionError("QAT has data of its own")

    start = quantize_ptq(ctx, checkpoint_of(ctx), QatConfig()).handle
    drawn = []

    class Watched(list):
        def __getitem__(self, index):
            drawn.append(index)
            return super().__getitem__(index)

    data = Watched(ctx.workload.train_data()[:32])
    monkeypatch.setattr(ctx.workload, "train_data", train_data)
    monkeypatch.setattr(ctx.workload, "qat_data", lambda: data)
    train_qat(ctx, start, QatConfig(epochs=1, batch_size=8), None)
    assert sorted(drawn) == list(range(32))


def test_frozen_batchnorm_keeps_its_statistics_and_trains_its_scale(ctx):
    start = quantize_ptq(ctx, checkpoint_of(ctx), QatConfig()).handle
    before = load_quantized_network(ctx.workload, start, ctx.store)[1]
    for frozen in (True, False):
        config = QatConfig(epochs=2, learning_rate=1e-2, freeze_batchnorm=frozen)
        after = load_quantized_network(ctx.workload, train_qat(ctx, start, config, None).handle, ctx.store)[1]
        assert torch.equal(before.running_mean, after.running_mean) is frozen
        assert not torch.equal(before.weight, after.weight)


def test_calibration_section_ignores_what_only_training_uses():
    one, other = QatConfig(epochs=1, learning_rate=1e-3), QatConfig(epochs=7, batch_size=5)
    assert calibration_section(one) == calibration_section(other)
    for change in ({"revision": 2}, {"percentile": 99.0}, {"keep_float": ("a",)}, {"calibration_samples": 9}):
        assert calibration_section(one) != calibration_section(one.model_copy(update=change))


def test_changed_epochs_run_qat_again_and_not_ptq(make_context, tmp_path):
    ctx = make_context(Halves(), tmp_path, reuse=True)
    floating = checkpoint_of(ctx)

    def pipeline(config):
        ctx.finished.clear()
        start = ptq.fn(ctx, floating, config)
        qat.fn(ctx, start.handle, config, None)
        return [(stage.name, stage.cached) for stage in ctx.finished]

    assert pipeline(QatConfig(epochs=1)) == [("ptq", False), ("qat", False)]
    assert pipeline(QatConfig(epochs=1)) == [("ptq", True), ("qat", True)]
    assert pipeline(QatConfig(epochs=2)) == [("ptq", True), ("qat", False)]
    assert pipeline(QatConfig(epochs=2, calibration="percentile")) == [("ptq", False), ("qat", False)]
