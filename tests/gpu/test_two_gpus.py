"""The same recipe on one GPU and on two, through torchrun: samples a second, and what was learnt.

ResNet-50 of torchvision in bfloat16 on the real digits at 224×224 among noise, 256 images a step and GPU.
"""

import json
import math
import statistics
from multiprocessing import Pool

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from jetway.configs.schema import QatConfig, TrainConfig, WorkloadConfig
from jetway.tasks.load import load_baseline
from jetway.tasks.qat import quantize_ptq, train_qat
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.workload import load_workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

COPIES = 24
SPLITS = {"train": range(1100), "calibration": range(1100, 1164), "evaluation": range(1164, 1797)}
LOOP = {"batch_size": 256, "loader_workers": 12, "schedule": "one_cycle"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels, labels = load_digits(return_X_y=True)
    made = [
        (pixels[index], folder / split / str(labels[index]) / f"{index}-{copy}.jpg", 100 * index + copy)
        for split, indices in SPLITS.items()
        for index in indices
        for copy in range(COPIES if split == "train" else 1)
    ]
    for path in {path.parent for _, path, _ in made}:
        path.mkdir(parents=True)
    with Pool(16) as pool:
        pool.starmap(draw, made, chunksize=64)
    return folder


def draw(digit, path, seed):
    """A digit of random size and place on noise."""
    generator = np.random.default_rng(seed)
    ground = generator.integers(0, 140, (28, 28)).astype(np.uint8)
    canvas = np.asarray(Image.fromarray(ground).resize((224, 224))).copy()
    size = int(generator.integers(90, 200))
    x, y = generator.integers(0, 224 - size, 2)
    drawn = np.asarray(Image.fromarray((digit.reshape(8, 8) * 15.9).astype(np.uint8)).resize((size, size)))
    canvas[y : y + size, x : x + size] = np.maximum(canvas[y : y + size, x : x + size], drawn)
    Image.fromarray(canvas).save(path, quality=90)


@pytest.fixture
def train_with(images, tmp_path):
    def run(processes):
        config = WorkloadConfig(
            class_path="jetway.tasks.workloads.imported:ImageClassifier",
            options={
                "factory": "torchvision.models:resnet50",
                "arguments": {"num_classes": 10},
                "data": str(images),
            },
        )
        folder = tmp_path / str(processes)
        context = StageContext(
            load_workload(config), Store(folder), workload_config=config, threads=8, work_dir=folder
        )
        torch.manual_seed(0)
        section = TrainConfig(epochs=4, learning_rate=1e-3, processes=processes, **LOOP)
        trained = load_baseline(context, None, section)
        qat = QatConfig(epochs=2, learning_rate=2e-5, processes=processes, **LOOP)
        calibrated = quantize_ptq(context, trained.handle, qat)
        quantized = train_qat(context, calibrated.handle, qat, None)
        return {
            "train": figures(context, trained, "train_history.json"),
            "qat": figures(context, quantized, "qat_history.json"),
        }

    return run


def figures(context, output, history):
    epochs = json.loads(context.store.open(output.files[history]).read_text())["history"][2:]
    rate = statistics.median(epoch["samples_per_s"] for epoch in epochs)
    return {"samples_per_s": rate, "top1": output.metrics["top1"]}


def test_two_gpus_train_nearly_twice_as_fast_to_the_same_metric(train_with):
    one, two = train_with(1), train_with(2)
    for stage in ("train", "qat"):
        ratio = two[stage]["samples_per_s"] / one[stage]["samples_per_s"]
        first, second = one[stage]["top1"], two[stage]["top1"]
        margin = 1.96 * math.sqrt((first * (1 - first) + second * (1 - second)) / len(SPLITS["evaluation"]))
        print(f"{stage}: x{ratio:.2f}, {one[stage]}, {two[stage]}, margin {margin:.4f}")
        assert ratio >= 1.7, stage
        assert abs(first - second) <= max(margin, 0.005), stage
