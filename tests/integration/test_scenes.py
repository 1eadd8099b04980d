"""The recipes on cluttered scenes, small; and their networks at the sizes of real deployments. Minutes long."""

import pytest

from jetway.configs.schema import (
    AnalyzeConfig,
    ExportConfig,
    FinetuneConfig,
    Precision,
    PruneConfig,
    VerifyConfig,
)
from jetway.tasks.analyze import analyze_network
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.export import export_onnx
from jetway.tasks.prune import prune_network
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.verify import verify_onnx
from jetway.tasks.workloads.detector import SceneDetector
from jetway.tasks.workloads.mobilenet_v3 import CropClassifier
from jetway.tasks.workloads.segmenter import SceneSegmenter

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SMALL = {
    "detector": "{size: 64, widths: [16, 32, 32], neck: 32, scenes: [64, 16, 32]}",
    "segmenter": "{size: 64, widths: [16, 32], depths: [1, 1], decoder: 32, scenes: [64, 16, 32]}",
    "mobilenet_v3": "{size: 32, variant: small, width: 0.5, round_to: 16, scenes: [32, 8, 16]}",
}
QUICK = ("train.epochs=1", "finetune.epochs=1", "qat.calibration_samples=16", "gates=[]",
         "prune.target_macs_ratio=0.7", "verify.int8_atol=1", "benchmark.min_duration_s=0.5")  # fmt: skip
VARIANTS = ["baseline-fp32", "pruned-fp32", "baseline-int8-ptq", "baseline-int8-qat", "pruned-int8-qat"]


@pytest.mark.parametrize("recipe", SMALL)
def test_a_recipe_runs_small(recipe, tmp_path, jetway):
    changes = [part for change in (f"workload.options={SMALL[recipe]}", *QUICK) for part in ("--set", change)]
    run = jetway("run", recipe, "--json", *changes, cwd=tmp_path)
    assert run.exit_code in (0, 5), run.stderr
    assert [row["variant"] for row in run.json["variants"]] == VARIANTS
    baseline, smallest = run.metrics("baseline-fp32"), run.metrics("pruned-int8-qat")
    assert smallest["size_bytes"] < 0.5 * baseline["size_bytes"]
    assert smallest["macs"] <= 0.7 * baseline["macs"]


GUIDE_SIZED = {
    "detector": lambda: SceneDetector(
        size=640, widths=[64, 128, 256, 512], depth=2, neck=128, scenes=[4, 2, 2]
    ),
    "segmenter": lambda: SceneSegmenter(
        size=224, widths=[64, 128, 320, 512], depths=[2, 2, 6, 2], decoder=128, scenes=[4, 2, 2]
    ),
    "mobilenet_v3": lambda: CropClassifier(size=224, variant="large", scenes=[4, 2, 2]),
}


@pytest.mark.parametrize("kind", GUIDE_SIZED)
def test_guide_sizes_are_analysed_pruned_and_exported(kind, tmp_path):
    context = StageContext(GUIDE_SIZED[kind](), Store(tmp_path / "store"), work_dir=tmp_path / "work")
    baseline = save_checkpoint(context.store, context.workload.network().eval(), structure=None)
    assert analyze_network(context, baseline, AnalyzeConfig(latency_runs=1)).metrics["macs"] > 0
    pruned = prune_network(context, baseline, PruneConfig(pruning_ratio=0.3, round_to=16), FinetuneConfig())
    assert pruned.metrics["macs_ratio"] < 0.8
    model = export_onnx(context, pruned.handle, ExportConfig(), Precision.FP32).handle
    verify_onnx(context, pruned.handle, model, VerifyConfig(samples=2), Precision.FP32)
