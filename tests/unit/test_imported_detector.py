"""Detectors by import path: boxes that stay on their objects, and ultralytics' networks where it is installed."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import readme_block
from PIL import Image

from jetway.configs.schema import (
    ExportConfig,
    FinetuneConfig,
    Precision,
    PruneConfig,
    VerifyConfig,
    WorkloadConfig,
)
from jetway.data.image_folder import BoxedImages, Preparation
from jetway.tasks.errors import ArtifactError, ConfigError, WorkloadError
from jetway.tasks.export import export_onnx
from jetway.tasks.load import load_baseline
from jetway.tasks.prune import prune_network
from jetway.tasks.verify import verify_onnx
from jetway.tasks.workload import check_workload, load_workload
from jetway.tasks.workloads.detector import decode_boxes
from jetway.tasks.workloads.yolo import plain_head

SIZE = 64


@pytest.fixture
def folder(tmp_path):
    """White squares on black, two an image of 80×48 pixels; the last image of each split shows nothing."""
    generator = np.random.default_rng(0)
    for split in ("train", "calibration", "evaluation"):
        for kind in ("images", "labels"):
            (tmp_path / "boxes" / split / kind).mkdir(parents=True)
        for index in range(6):
            pixels, lines = np.zeros((48, 80, 3), np.uint8), []
            for label in range(2 * (index < 5)):
                x, y = 40 * label + generator.integers(4, 18), generator.integers(4, 26)
                pixels[y : y + 16, x : x + 16] = 255
                lines.append(f"{label} {(x + 8) / 80} {(y + 8) / 48} {16 / 80} {16 / 48}\n")
            Image.fromarray(pixels).save(tmp_path / "boxes" / split / "images" / f"{index}.png")
            if lines:
                (tmp_path / "boxes" / split / "labels" / f"{index}.txt").write_text("".join(lines))
    return tmp_path / "boxes"


def detector(folder, factory, **options):
    given = {"factory": factory, "data": str(folder), "labels": ["left", "right"], "size": SIZE}
    class_path = "jetway.tasks.workloads.imported_detector:ImageDetector"
    return load_workload(WorkloadConfig(class_path=class_path, options=given | options))


@pytest.mark.parametrize("smallest_crop", [1.0, 0.5], ids=["whole", "cropped"])
def test_boxes_stay_on_their_objects(folder, smallest_crop):
    torch.manual_seed(1)
    data = BoxedImages(folder / "train", 2, Preparation(SIZE, padding=0), smallest_crop=smallest_crop)
    seen = 0
    for index in [*range(5)] * 4:
        inputs, target = data[index]
        bright = inputs["image"][0] > inputs["image"].mean()
        for box in target["boxes"][target["labels"] >= 0].round().int().tolist():
            x1, y1, x2, y2 = box
            assert float(bright[y1:y2, x1:x2].float().mean()) > 0.8
            around = bright[max(0, y1 - 3) : y2 + 3, max(0, x1 - 3) : x2 + 3]
            assert around.sum() < 1.4 * (x2 - x1) * (y2 - y1)
            seen += 1
    assert seen == 40 if smallest_crop == 1 else 20 < seen < 40


def test_an_image_is_seen_whole_and_may_show_nothing(folder):
    data = BoxedImages(folder / "evaluation", 2, Preparation(SIZE, padding=114))
    inputs, target = data[0]
    assert (target["labels"] >= 0).sum() == 2
    grey = (114 / 255 - torch.tensor(data.preparation.mean)) / torch.tensor(data.preparation.deviation)
    assert torch.allclose(inputs["image"][:, 0, 0], grey, atol=1e-2), "what is above the image"
    _, nothing = data[5]
    assert nothing["labels"].tolist() == [-1, -1]


@pytest.mark.parametrize("line", ["2 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.1", "cat 0.5 0.5 0.1 0.1"])
def test_a_line_that_is_no_object_is_named(folder, line):
    (folder / "train/labels/0.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(
        WorkloadError, match=rf"0\.txt:2: '{line}' is no object. Write its class, from 0 to 1"
    ):
        BoxedImages(folder / "train", 2, Preparation(SIZE, padding=114))


def test_a_detector_of_ones_own_is_scored_by_its_boxes(folder, tmp_path, monkeypatch):
    (tmp_path / "boxes_by_path.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body = nn.Conv2d(3, 6, 8, 8)\n"
        "    def forward(self, image):\n"
        "        found = self.body(image).flatten(2)\n"
        "        return found[:, :2], found[:, 2:]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    workload = detector(folder, "boxes_by_path:Net", strides=[8])
    check_workload(workload)
    inputs, target = workload.collate([workload.evaluation_data()[index] for index in (0, 5)])
    classes, distances = workload.network()(inputs["image"])
    loss = workload.loss({"class_logits": classes, "distances": distances}, target)
    assert loss > 0
    found = target["boxes"][0].numpy(), np.ones(2), target["labels"][0].numpy()
    record = workload.score_boxes(*found, workload.evaluation_data()[0][1])
    assert workload.summarize([record])["map50_95"] == pytest.approx(1.0)
    assert workload.frame_processing().input.keep_aspect


def test_a_head_of_another_kind_is_named():
    with pytest.raises(
        ConfigError, match=r"x\.yaml ends in a Linear without cv2, cv3, dfl. Take a detector of"
    ):
        plain_head(torch.nn.Linear(2, 2), "x.yaml")


def test_an_architecture_that_is_no_file_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "reads_a_file.py").write_text("def make(cfg):\n    return open(cfg)\n")
    monkeypatch.syspath_prepend(tmp_path)
    workload = detector(folder, "reads_a_file:make", arguments={"cfg": "none.yaml"})
    with pytest.raises(ConfigError, match=r"workload\.options: reads_a_file:make.*No such file.*none\.yaml"):
        workload.network()


needs_ultralytics = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed"
)
ARCHITECTURES = ("yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml")


@pytest.fixture
def saved(folder, make_context, tmp_path, monkeypatch):
    """Saves a network as ultralytics does, and its weights as the README says; gives it and a context for them."""
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel

    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))

    def save(architecture):
        theirs = YOLO(architecture)
        theirs.model = DetectionModel(architecture, nc=2, verbose=False)
        theirs.save(tmp_path / "best.pt")
        command = readme_block("ultralytics weights").partition("python -c ")[2].strip().strip('"')
        subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True, capture_output=True)
        arguments = {"cfg": architecture, "nc": 2}
        workload = detector(folder, "jetway.tasks.workloads.yolo:detector", arguments=arguments)
        return theirs.model, make_context(workload, tmp_path)

    return save


@needs_ultralytics
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_of_ultralytics_is_loaded_without_pickle(saved, architecture, tmp_path):
    """It answers as its own network does, also as ONNX."""
    theirs, context = saved(architecture)
    with pytest.raises(ArtifactError, match="not a plain state dict"):
        load_baseline(context, tmp_path / "best.pt", None)
    baseline = load_baseline(context, tmp_path / "weights.pt", None)
    assert set(baseline.metrics) == {"map50_95", "map50"}
    check_answers(context.workload, theirs, torch.load(tmp_path / "weights.pt", weights_only=True))
    check_onnx(context, baseline.handle)


@needs_ultralytics
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_detector_of_ultralytics_is_pruned(saved, architecture, tmp_path, caplog):
    _, context = saved(architecture)
    baseline = load_baseline(context, tmp_path / "weights.pt", None).handle
    pruned = prune_network(context, baseline, PruneConfig(pruning_ratio=0.5), FinetuneConfig())
    assert pruned.metrics["macs_ratio"] < 0.35
    assert ("attn.qkv.conv" in caplog.text) == (architecture != "yolov8n.yaml")
    check_onnx(context, pruned.handle)


def check_onnx(context, checkpoint):
    model = export_onnx(context, checkpoint, ExportConfig(), Precision.FP32).handle
    verify_onnx(context, checkpoint, model, VerifyConfig(samples=2), Precision.FP32)


def check_answers(workload, theirs, weights):
    """Boxes and scores of both, where theirs are decoded: middle and size in pixels, behind them the scores."""
    ours = workload.network()
    ours.load_state_dict(weights)
    theirs.end2end = False
    image = workload.evaluation_data()[0][0]["image"][None]
    with torch.no_grad():
        expected = theirs.float().eval()(image)[0][0]
        classes, distances = ours.eval()(image)
    boxes = decode_boxes(distances, workload.cells)[0].T
    middle, size = (boxes[:2] + boxes[2:]) / 2, boxes[2:] - boxes[:2]
    assert torch.allclose(torch.cat([middle, size]), expected[:4], atol=1e-3)
    assert torch.allclose(classes[0].sigmoid(), expected[4:], atol=1e-5)
