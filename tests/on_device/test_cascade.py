"""Verb ``cascade`` in this process: cutting out as the training data does, and engines whose answers are known."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from torch.nn import functional

from jetway.tasks.frames import Boxes, Classes, FrameInput, FrameProcessing
from jetway.tasks.on_device import cascade, machine
from jetway.tasks.on_device.frames import resize

SIZE, CELLS, FRAMES = 32, 20, 24
#: Second row and third column of the fine level, whose cells are 8 pixels: its middle is at 20, 12.
CELL, BOX = 6, (12, 8, 28, 16)


@pytest.mark.parametrize("centre", [(20.0, 12.0), (1.0, 30.0), (31.5, 0.5)], ids=str)
def test_what_is_cut_out_is_what_the_training_data_cuts_out(centre):
    """Squares reach beyond the edges, where ``grid_sample`` reflects."""
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    side, size = 18.0, 10
    x, y = (2 * np.array(centre) / SIZE - 1).tolist()
    matrix = torch.tensor([[[side / SIZE, 0, x], [0, side / SIZE, y]]])
    grid = functional.affine_grid(matrix, [1, 3, size, size], align_corners=False)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = functional.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)[0]
    found = resize.cropped(image, np.array(centre), side, size).transpose(2, 0, 1)
    np.testing.assert_allclose(found, expected, atol=0.05)


def constant_network(path, inputs, outputs, *, brightness=False):
    """Gives fixed outputs whatever the image; with ``brightness``, the image's mean is added to the last of them."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, list(inputs))
    nodes = [helper.make_node("ReduceMean", ["image"], ["mean"], keepdims=0)]
    scale = np.float32(1 if brightness else 0)
    weights = [numpy_helper.from_array(np.asarray(scale), "scale")]
    nodes.append(helper.make_node("Mul", ["mean", "scale"], ["added"]))
    made = []
    for name, value in outputs.items():
        mask = np.zeros_like(value)
        mask.reshape(-1)[-1] = 1
        weights += [
            numpy_helper.from_array(value, f"{name}.value"),
            numpy_helper.from_array(mask, f"{name}.mask"),
        ]
        nodes.append(helper.make_node("Mul", [f"{name}.mask", "added"], [f"{name}.more"]))
        nodes.append(helper.make_node("Add", [f"{name}.value", f"{name}.more"], [name]))
        made.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(value.shape)))
    graph = helper.make_graph(nodes, "constant", [image], made, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def request_of(workplace, tmp_path):
    """A detector that sees one object in every frame, and a classifier that tells white from black."""
    logits = np.full((1, 2, CELLS), -9, np.float32)
    logits[0, 1, CELL] = 3.0
    sides = np.zeros((1, 4, CELLS), np.float32)
    sides[0, :, CELL] = (1, 0.5, 1, 0.5)
    detector = constant_network(
        tmp_path / "detector.onnx", (1, 3, SIZE, SIZE), {"classes": logits, "sides": sides}
    )
    classifier = constant_network(
        tmp_path / "classifier.onnx",
        (1, 3, 8, 8),
        {"logits": np.array([[100.0, 0, 0]], np.float32)},
        brightness=True,
    )

    def entry(name, path, size):
        inputs = workplace.save(f"{name}.inputs", image=np.zeros((1, 3, size, size), np.float32))
        return workplace.entry(name, path, inputs)

    def make(frames, **changes):
        np.save(tmp_path / "frames.npy", frames)
        boxes = Boxes(class_logits="classes", distances="sides", strides=(8, 16), min_score=0.3)
        found = FrameProcessing(input=FrameInput(name="image", size=(SIZE, SIZE)), results=boxes)
        named = FrameProcessing(input=FrameInput(name="image", size=(8, 8)), results=Classes(output="logits"))
        return {
            "pairs": [
                {
                    "name": "both",
                    "detector": entry("detector", detector, SIZE),
                    "classifier": entry("classifier", classifier, 8),
                }
            ],
            "detector": found.model_dump(mode="json"),
            "classifier": named.model_dump(mode="json"),
            "source": str(tmp_path / "frames.npy"),
            "frames": FRAMES,
            "margin": 1.0,
            "max_objects": 4,
            "warmup_frames": 3,
            "queue_frames": 1,
            "telemetry": False,
            "max_duration_s": 60.0,
            "work_dir": str(workplace.work_dir),
            **changes,
        }

    return make


def run(request, monkeypatch):
    monkeypatch.setattr(machine, "waited_for_cpu_ns", lambda: 0)
    return cascade.run(request, lambda line: None)


def test_the_classifier_names_what_the_detector_finds(request_of, monkeypatch):
    """The object is white in every third frame, and black in the others, on grey."""
    frames = np.full((FRAMES, SIZE, SIZE, 3), 110, np.uint8)
    x1, y1, x2, y2 = BOX
    for index in range(FRAMES):
        frames[index, y1 - 4 : y2 + 4, x1:x2] = 255 if index % 3 == 0 else 0
    result = run(request_of(frames), monkeypatch)
    assert result["reasons"] == []
    assert result["frames"] == FRAMES
    found = load_file(result["results"]["path"])
    assert found["both.frame"].tolist() == list(range(FRAMES))
    assert found["both.labels"].tolist() == [2 if index % 3 == 0 else 0 for index in range(FRAMES)]
    np.testing.assert_allclose(found["both.boxes"], np.tile(BOX, (FRAMES, 1)), atol=1e-4)
    np.testing.assert_allclose(found["both.scores"], 1 / (1 + np.exp(-3.0)), rtol=1e-5)


def test_every_step_of_every_frame_is_timed(request_of, monkeypatch):
    result = run(request_of(np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8)), monkeypatch)
    samples = load_file(result["samples"]["path"])
    for step in cascade.STEPS:
        assert len(samples[f"both.{step}_ns"]) == FRAMES
        assert (samples[f"both.{step}_ns"] > 0).all()


def test_frames_without_objects_have_no_results(request_of, monkeypatch):
    request = request_of(np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8))
    request["detector"]["results"]["min_score"] = 0.99
    result = run(request, monkeypatch)
    found = load_file(result["results"]["path"])
    assert found["both.boxes"].shape == (0, 4)
    assert found["both.frame"].shape == (0,)
