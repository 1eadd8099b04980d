"""Networks of torchvision, timm and transformers through every host stage, where those packages are.

Weights are as the packages initialize them, as none can be downloaded here, and are trained for a few steps: what is
shown is that each network can be pruned, trained, quantized, exported and lowered, and still computes the same.
"""

import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from jetway.configs.schema import (
    BACKENDS,
    ExportConfig,
    FinetuneConfig,
    Precision,
    PruneConfig,
    QatConfig,
    TensorRtConfig,
    TrainConfig,
    VerifyConfig,
    WorkloadConfig,
)
from jetway.tasks.export import export_onnx
from jetway.tasks.finetune import finetune_network
from jetway.tasks.load import load_baseline
from jetway.tasks.lower import lower_onnx
from jetway.tasks.prune import prune_network
from jetway.tasks.qat import quantize_ptq, train_qat
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.verify import verify_onnx
from jetway.tasks.workload import load_workload

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

CLASSES = 10
TORCHVISION = {
    "ResNet-50": "resnet50",
    "MobileNetV3-Large": "mobilenet_v3_large",
    "ConvNeXt-Tiny": "convnext_tiny",
    "ViT-B/16": "vit_b_16",
    "Swin-T": "swin_t",
}
SEGFORMER = {
    "factory": "transformers:SegformerForSemanticSegmentation",
    "arguments": {"config": {"factory": "transformers:SegformerConfig", "num_labels": 3}},
}
NETWORKS = {
    **{name: {"factory": f"torchvision.models:{factory}", "arguments": {"num_classes": CLASSES}}
       for name, factory in TORCHVISION.items()},
    "timm ResNet-18": {
        "factory": "timm:create_model", "arguments": {"model_name": "resnet18", "num_classes": CLASSES},
    },
    "timm ViT-S/16": {
        "factory": "timm:create_model",
        "arguments": {"model_name": "vit_small_patch16_224", "num_classes": CLASSES},
    },
    "transformers SegFormer": SEGFORMER,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The real digits at 224×224: a folder a class, and the same beside masks of ground, digit and edge."""
    folder = tmp_path_factory.mktemp("images")
    pixels, labels = load_digits(return_X_y=True)
    splits = {"train": range(160), "calibration": range(160, 192), "evaluation": range(200, 264)}
    for split, indices in splits.items():
        for index in indices:
            image = Image.fromarray((pixels[index].reshape(8, 8) * 15.9).astype(np.uint8)).resize((224, 224))
            write(image, folder / "classes" / split / str(labels[index]) / f"{index}.png")
            write(image, folder / "scenes" / split / "images" / f"{index}.png")
            levels = np.digitize(np.asarray(image), [40, 160]).astype(np.uint8)
            write(Image.fromarray(levels), folder / "scenes" / split / "masks" / f"{index}.png")
    return folder


def write(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def context(images, tmp_path):
    def make(options):
        segments = options["factory"].startswith("transformers")
        kind, data = ("ImageSegmenter", "scenes") if segments else ("ImageClassifier", "classes")
        config = WorkloadConfig(
            class_path=f"jetway.tasks.workloads.imported:{kind}",
            options={**options, "data": str(images / data)},
        )
        workload = load_workload(config)
        return StageContext(workload, Store(Path(tmp_path)), workload_config=config, work_dir=tmp_path)

    return make


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_goes_through_every_host_stage(context, name):
    importlib.import_module(NETWORKS[name]["factory"].partition(".")[0].partition(":")[0])
    run = context(NETWORKS[name])
    loop = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-4, "gradient_clip_norm": 1.0}
    baseline = load_baseline(run, None, TrainConfig(**loop)).handle
    pruning = prune_network(
        run, baseline, PruneConfig(pruning_ratio=0.25, round_to=16), FinetuneConfig(**loop)
    )
    assert pruning.metrics["macs_ratio"] < 0.85, f"{name}: {pruning.metrics}"
    tuned = finetune_network(run, pruning.handle, FinetuneConfig(**loop), None).handle
    section = QatConfig(**loop | {"calibration_samples": 16})
    calibrated = quantize_ptq(run, tuned, section).handle
    trained = train_qat(run, calibrated, section, None).handle
    for checkpoint, precision in ((tuned, Precision.FP32), (trained, Precision.INT8_QAT)):
        exported = export_onnx(run, checkpoint, ExportConfig(opset=17), precision).handle
        for engine in ("ort-cpu", "tensorrt"):
            lowered = lower_onnx(run, exported, BACKENDS[engine], precision, section, TensorRtConfig()).handle
            report = verify_onnx(run, checkpoint, lowered, VerifyConfig(samples=16), precision)
            print(
                f"{name} {precision} for {engine}: MACs x{pruning.metrics['macs_ratio']:.2f}", report.metrics
            )
