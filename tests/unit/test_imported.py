"""Networks by import path, on folders of images made from the real digits."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from jetway.configs.schema import TrainConfig, WorkloadConfig
from jetway.data.image_folder import IGNORED, Crop, Preparation, random_crop
from jetway.tasks.errors import JetwayError, WorkloadError
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.training import train
from jetway.tasks.workload import call_network, check_workload, load_workload


@pytest.fixture
def digits(tmp_path):
    """Folders of the first three digits as PNG files, 24×20 pixels."""
    images, labels = load_digits(return_X_y=True)
    splits = {"train": range(200), "calibration": range(200, 260), "evaluation": range(260, 400)}
    for split, indices in splits.items():
        for index in indices:
            if labels[index] < 3:
                folder = tmp_path / "images" / split / f"digit {labels[index]}"
                folder.mkdir(parents=True, exist_ok=True)
                pixels = (images[index].reshape(8, 8) * 15.9).astype(np.uint8)
                Image.fromarray(pixels).resize((24, 20)).save(folder / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def scenes(tmp_path):
    """A bright square on a dark ground, and its mask, whose first row belongs to no class."""
    generator = np.random.default_rng(0)
    for split in ("train", "calibration", "evaluation"):
        for kind in ("images", "masks"):
            (tmp_path / "scenes" / split / kind).mkdir(parents=True)
        for index in range(6):
            mask = np.zeros((32, 32), np.uint8)
            x, y = generator.integers(2, 20, 2)
            mask[y : y + 10, x : x + 10] = 1
            noise = generator.integers(0, 60, (32, 32), np.uint8)
            mask[0] = IGNORED
            Image.fromarray(noise + 180 * (mask == 1).astype(np.uint8)).save(
                tmp_path / "scenes" / split / "images" / f"{index}.jpg"
            )
            Image.fromarray(mask).save(tmp_path / "scenes" / split / "masks" / f"{index}.png")
    return tmp_path / "scenes"


def classifier(folder, **options):
    return load_workload(
        WorkloadConfig(
            class_path="jetway.tasks.workloads.imported:ImageClassifier",
            options={"factory": "networks_by_path:small", "data": str(folder), "size": 16} | options,
        )
    )


@pytest.fixture(autouse=True)
def networks(tmp_path, monkeypatch):
    (tmp_path / "networks_by_path.py").write_text(
        "from torch import nn\n"
        "class Config:\n"
        "    def __init__(self, width): self.width = width\n"
        "def small(classes=3, config=None):\n"
        "    width = config.width if config else 16\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),\n"
        "        nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, classes))\n"
        "def coarse():\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 2, 3, 1, 1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_classifier_of_an_image_folder_learns(digits, tmp_path):
    workload = classifier(digits)
    check_workload(workload)
    assert workload.labels == ("digit 0", "digit 1", "digit 2")
    inputs, label = workload.evaluation_data()[0]
    assert inputs["image"].shape == (3, 16, 16)
    assert label == 0
    context = StageContext(workload, Store(tmp_path), work_dir=tmp_path / "work")
    section = TrainConfig(epochs=4, batch_size=16, learning_rate=3e-3)
    result = train(
        workload.network(), workload, section, context=context, data=workload.train_data(), stage="train"
    )
    assert result.metrics["top1"] > 0.8


def test_a_segmenter_scales_coarse_logits_and_ignores_pixels(scenes, tmp_path):
    workload = load_workload(
        WorkloadConfig(
            class_path="jetway.tasks.workloads.imported:ImageSegmenter",
            options={"factory": "networks_by_path:coarse", "data": str(scenes), "size": 32},
        )
    )
    inputs, mask = workload.evaluation_data()[0]
    assert mask.shape == (32, 32)
    assert set(mask.unique().tolist()) == {0, 1, IGNORED}
    outputs = call_network(workload.network(), {"image": inputs["image"][None]}, workload.output_names)
    assert outputs["logits"].shape == (1, 2, 16, 16)
    assert workload.loss(outputs, mask[None]) > 0

    known = torch.where(mask == IGNORED, 0, mask)
    right = torch.nn.functional.one_hot(known, 2).permute(2, 0, 1).float().numpy()
    record = workload.score_sample({"logits": right}, mask)
    assert sum(record["true"]) == 31 * 32
    assert workload.summarize([record]) == {"miou": 1.0, "pixel_accuracy": 1.0}
    ground = workload.score_sample({"logits": np.stack([np.ones((32, 32)), np.zeros((32, 32))])}, mask)
    share = 1 - 100 / (31 * 32)
    assert workload.summarize([ground]) == pytest.approx({"miou": share / 2, "pixel_accuracy": share})


def test_training_crops_an_image_and_its_mask_alike(scenes):
    preparation = Preparation(32)
    torch.manual_seed(0)
    agreed = []
    for index in range(6):
        crop = random_crop(0.5)
        image = preparation.image(scenes / "train" / "images" / f"{index}.jpg", crop).mean(0)
        mask = preparation.mask(scenes / "train" / "masks" / f"{index}.png", crop)
        agreed.append(float(((image > 0) == (mask == 1)).float().mean()))
    assert min(agreed) > 0.9


def test_a_crop_is_in_the_middle_unless_told_otherwise():
    assert Crop().box((40, 20)) == (10, 0, 30, 20)
    assert Crop(share=0.5, left=0, top=1).box((40, 20)) == (0, 10, 10, 20)


def test_an_argument_may_be_made_by_a_factory_too(digits):
    config = {"factory": "networks_by_path:Config", "width": 32}
    network = classifier(digits, arguments={"config": config}).network()
    assert network[0].out_channels == 32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"factory": "no_such_package.models:net"}, "pip install no_such_package"),
        ({"factory": "networks_by_path:missing"}, "no callable 'missing'"),
        ({"factory": "networks_by_path"}, "A factory is package.module:name"),
        ({"arguments": {"colour": 3}}, "unexpected keyword argument 'colour'"),
        ({"factory": "builtins:dict", "arguments": {}}, "made a dict"),
        ({"data": "nowhere"}, "There is no folder nowhere"),
    ],
)
def test_what_cannot_be_made_says_why(digits, options, said):
    with pytest.raises(JetwayError, match=said):
        check_workload(classifier(digits, **options))


def test_damaged_and_missing_files_are_named(digits, scenes):
    (digits / "train" / "digit 0" / "0.png").write_bytes(b"no image")
    with pytest.raises(WorkloadError, match=r"0\.png is no readable image"):
        classifier(digits).train_data()[0]
    (digits / "evaluation" / "digit 2").rename(digits / "evaluation" / "digit 7")
    with pytest.raises(WorkloadError, match=r"digit 7'\] are no classes of the training images"):
        classifier(digits).evaluation_data()
    (scenes / "train" / "masks" / "3.png").unlink()
    workload = load_workload(
        WorkloadConfig(
            class_path="jetway.tasks.workloads.imported:ImageSegmenter",
            options={"factory": "networks_by_path:coarse", "data": str(scenes)},
        )
    )
    with pytest.raises(WorkloadError, match=r"no mask of their name, such as 3\.jpg"):
        workload.train_data()


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        ("torchvision.models:resnet18", {"num_classes": 3}),
        ("timm:create_model", {"model_name": "resnet18", "num_classes": 3}),
        (
            "transformers:ResNetForImageClassification",
            {"config": {"factory": "transformers:ResNetConfig", "num_labels": 3, "depths": [1, 1, 1, 1]}},
        ),
    ],
    ids=["torchvision", "timm", "transformers"],
)
def test_networks_of_the_libraries_that_are_here(digits, factory, arguments):
    package = factory.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    check_workload(classifier(digits, factory=factory, arguments=arguments, size=64))
