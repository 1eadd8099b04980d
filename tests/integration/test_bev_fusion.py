"""The BEV fusion workload at the size that is driven with: six cameras of 256×704, 180×180 cells. Minutes long."""

import pytest

from jetway.configs.schema import (
    BACKENDS,
    AnalyzeConfig,
    ExportConfig,
    FinetuneConfig,
    Precision,
    PruneConfig,
    QatConfig,
    TensorRtConfig,
    VerifyConfig,
)
from jetway.tasks.analyze import analyze_network
from jetway.tasks.checkpoint import load_network, save_checkpoint
from jetway.tasks.export import export_onnx
from jetway.tasks.lower import lower_onnx
from jetway.tasks.prune import prune_network
from jetway.tasks.qat import quantize_ptq
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.verify import verify_onnx
from jetway.tasks.workloads.bev_fusion import BevFusionWorkload

LARGE = {
    "cameras": 6, "image_size": (256, 704), "view_degrees": 70.0, "pitch_degrees": 2.0, "extent_m": 54.0, "cells": 180,
    "channels": 64, "dims": (96, 192), "depths": (2, 6), "num_heads": (4, 8), "window": (8, 11), "depth_bins": 59,
    "frames": 2, "evaluation_frames": 1,
}  # fmt: skip
PRUNE = PruneConfig(
    pruning_ratio=0.25,
    pruning_ratios={"image_encoder.*": 0.2, "neck.*": 0.3},
    head_ratios={"image_encoder.stages.1.*": 0.25},
    depth={"keep": {"image_encoder.stages.1.blocks": 4}, "importance": "influence", "samples": 1},
    round_to=16,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    return StageContext(
        BevFusionWorkload(**LARGE), store=Store(folder / "store"), work_dir=folder / "work", threads=2
    )


@pytest.fixture(scope="module")
def baseline(context):
    return save_checkpoint(context.store, context.workload.network().eval(), structure=None)


@pytest.fixture(scope="module")
def pruned(context, baseline):
    return prune_network(context, baseline, PRUNE, FinetuneConfig())


def test_it_is_analyzed(context, baseline):
    metrics = analyze_network(context, baseline, AnalyzeConfig(latency_runs=1)).metrics
    assert metrics["macs"] > 25e9


def test_it_loses_channels_heads_and_layers(context, pruned):
    network = load_network(context.workload, pruned.handle, context.store)
    blocks = network.image_encoder.stages[1].blocks
    assert sum(hasattr(block, "attention") for block in blocks) == 4
    assert next(block for block in blocks if hasattr(block, "attention")).attention.num_heads == 6
    assert pruned.metrics["macs_ratio"] < 0.7


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8_PTQ])
def test_its_onnx_agrees_with_pytorch(context, pruned, precision):
    qat = QatConfig(calibration_samples=1)
    checkpoint = pruned.handle
    if precision.has_quantizers:
        checkpoint = quantize_ptq(context, checkpoint, qat).handle
    model = export_onnx(context, checkpoint, ExportConfig(), precision).handle
    lowered = lower_onnx(context, model, BACKENDS["ort-cpu"], precision, qat, TensorRtConfig()).handle
    verify_onnx(context, checkpoint, lowered, VerifyConfig(samples=1, int8_atol=0.15), precision)
