"""Generated texts, key by key from the declared values; the parser of boxes is compiled against a double's header."""

import configparser
import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from jetway.configs.schema import Precision
from jetway.tasks.deepstream import CONFIG, PARSER, deepstream_files
from jetway.tasks.frames import Boxes, Classes, FrameInput, FrameProcessing, Masks
from jetway.tasks.on_device.frames import postprocess
from jetway.tasks.on_device.frames.preprocess import Placement

LABELS = ("cat", "dog", "bird")
BOXES = Boxes(class_logits="logits", distances="sides", strides=(8, 16), min_score=0.3, max_iou=0.55)

#: Of NVIDIA's header what the parser uses, in the order of its fields.
HEADER = """
#include <vector>
typedef struct { unsigned int numDims; unsigned int d[8]; unsigned int numElements; } NvDsInferDims;
typedef enum { FLOAT = 0, HALF = 1, INT8 = 2, INT32 = 3 } NvDsInferDataType;
typedef struct {
  NvDsInferDataType dataType; union { NvDsInferDims inferDims; }; int bindingIndex;
  const char *layerName; void *buffer; int isInput;
} NvDsInferLayerInfo;
typedef struct { unsigned int width, height, channels; } NvDsInferNetworkInfo;
typedef struct { unsigned int numClassesConfigured; std::vector<float> perClassPreclusterThreshold; }
  NvDsInferParseDetectionParams;
typedef struct { unsigned int classId; float left, top, width, height, detectionConfidence; }
  NvDsInferObjectDetectionInfo;
"""
CALLER = """
#include "parse_boxes.cpp"
extern "C" int parse(float *logits, float *sides, float *boxes, int room) {
  NvDsInferLayerInfo first = {}, second = {};
  first.layerName = "sides"; first.buffer = sides;
  second.layerName = "logits"; second.buffer = logits;
  NvDsInferParseDetectionParams params = {3, {0.3f, 0.3f, 0.3f}};
  std::vector<NvDsInferObjectDetectionInfo> found;
  if (!NvDsInferParseJetwayBoxes({first, second}, {48, 32, 3}, params, found)) return -1;
  if ((int)found.size() > room) return -2;
  for (auto &box : found) {
    float values[] = {box.left, box.top, box.left + box.width, box.top + box.height,
                      box.detectionConfidence, (float)box.classId};
    for (float value : values) *boxes++ = value;
  }
  return found.size();
}
"""


def config_of(results=BOXES, precision=Precision.FP16, **declared):
    values = {"name": "image", "size": (48, 32), **declared}
    frames = FrameProcessing(input=FrameInput(**values), results=results)
    text = deepstream_files(frames, precision, LABELS)[CONFIG]
    parser = configparser.ConfigParser()
    parser.read_string(text)
    return parser, text


def test_the_input_is_scaled_as_the_workload_scales_it():
    declared = {"colour": "bgr", "mean": (103.5, 116.0, 123.0), "deviation": (58.0, 58.0, 58.0)}
    found = config_of(**declared)[0]["property"]
    assert found["infer-dims"] == "3;32;48"
    assert found["model-color-format"] == "1"
    assert float(found["net-scale-factor"]) == pytest.approx(1 / 58, rel=1e-9)
    assert [float(value) for value in found["offsets"].split(";")] == [103.5, 116.0, 123.0]
    assert (found["maintain-aspect-ratio"], found["symmetric-padding"]) == ("0", "0")


@pytest.mark.parametrize(("colour", "expected", "dims"), [("rgb", "0", "3;32;48"), ("gray", "2", "1;32;48")])
def test_colours_have_nvinfers_numbers(colour, expected, dims):
    found = config_of(colour=colour)[0]["property"]
    assert (found["model-color-format"], found["infer-dims"]) == (expected, dims)


def test_the_aspect_is_kept_in_the_middle():
    found = config_of(keep_aspect=True)[0]["property"]
    assert (found["maintain-aspect-ratio"], found["symmetric-padding"]) == ("1", "1")


@pytest.mark.parametrize(
    ("precision", "mode"),
    [
        (Precision.FP32, "0"),
        (Precision.BF16, "0"),
        (Precision.FP16, "2"),
        (Precision.INT8_QAT, "1"),
        (Precision.INT8_CALIBRATED, "1"),
    ],
)
def test_the_engine_is_jetways_and_its_precision_is_told(precision, mode):
    found = config_of(precision=precision)[0]["property"]
    assert found["network-mode"] == mode
    assert found["model-engine-file"] == "../model.engine"
    assert found["onnx-file"] == "../model.onnx"
    assert found["labelfile-path"] == "../labels.txt"


def test_a_detector_has_its_classes_thresholds_and_parser():
    parsed, _ = config_of()
    found = parsed["property"]
    assert (found["network-type"], found["num-detected-classes"], found["cluster-mode"]) == ("0", "3", "2")
    assert found["output-blob-names"] == "logits;sides"
    assert found["parse-bbox-func-name"] == "NvDsInferParseJetwayBoxes"
    attributes = parsed["class-attrs-all"]
    assert float(attributes["pre-cluster-threshold"]) == 0.3
    assert float(attributes["nms-iou-threshold"]) == 0.55


def test_a_classifier_and_a_segmenter_are_told_as_such():
    classifier, _ = config_of(Classes(output="scores"))
    assert classifier["property"]["network-type"] == "1"
    assert classifier["property"]["output-blob-names"] == "scores"
    segmenter, _ = config_of(Masks(output="scores"))
    assert segmenter["property"]["network-type"] == "2"
    assert segmenter["property"]["num-detected-classes"] == "3"
    assert "class-attrs-all" not in segmenter


def test_what_nvinfer_cannot_do_is_said():
    assert "not run on a board" in config_of()[1]
    assert "one factor" not in config_of(deviation=(58.0, 58.0, 58.0))[1]
    assert "up to 9.1% off" in config_of(deviation=(50.0, 55.0, 60.0))[1]
    assert "grey level 114" in config_of(keep_aspect=True, padding=114)[1]
    assert "grey level" not in config_of(padding=114)[1]


def test_the_script_takes_a_camera_or_a_file(tmp_path):
    script = deepstream_files(
        FrameProcessing(input=FrameInput(name="image", size=(8, 8)), results=Classes(output="scores")),
        Precision.FP16,
        LABELS,
    )["run.sh"]
    assert "not run on a board" in script
    path, tools = tmp_path / "run.sh", tmp_path / "bin"
    tools.mkdir()
    path.write_text(script)
    launch = tools / "gst-launch-1.0"
    launch.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    launch.chmod(0o755)

    def said(*arguments):
        command = ["sh", str(path), *arguments]
        environment = {"PATH": f"{tools}:/usr/bin:/bin", "WIDTH": "1920", "HEIGHT": "1080"}
        return subprocess.run(
            command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.splitlines()

    camera = said()
    assert "nvarguscamerasrc" in camera
    assert "video/x-raw(memory:NVMM),width=1920,height=1080,framerate=30/1,format=NV12" in camera
    assert "live-source=1" in camera
    video = said("a video.mp4")
    assert f"uri=file://{tmp_path}/a video.mp4" in video
    assert "live-source=0" in video
    assert "config-file-path=config_infer_primary.txt" in video


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_parser_finds_the_boxes_that_jetway_decodes(tmp_path):
    frames = FrameProcessing(input=FrameInput(name="image", size=(48, 32)), results=BOXES)
    (tmp_path / PARSER).write_text(deepstream_files(frames, Precision.FP16, LABELS)[PARSER])
    (tmp_path / "nvdsinfer_custom_impl.h").write_text(HEADER)
    (tmp_path / "caller.cpp").write_text(CALLER)
    library = tmp_path / "parser.so"
    command = [
        "g++",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        f"-I{tmp_path}",
        "-o",
        library,
        tmp_path / "caller.cpp",
    ]
    subprocess.run(command, check=True)
    cells = 6 * 4 + 3 * 2
    generator = np.random.default_rng(0)
    logits = generator.normal(-1.5, 1.5, (1, 3, cells)).astype(np.float32)
    sides = generator.uniform(0, 2, (1, 4, cells)).astype(np.float32)

    room = 3 * cells
    boxes = np.zeros((room, 6), np.float32)
    pointers = [array.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for array in (logits, sides, boxes)]
    count = ctypes.CDLL(str(library)).parse(*pointers, room)

    declared = BOXES.model_copy(update={"max_iou": 1.0}).model_dump(mode="json")
    finish = postprocess.postprocess_of(declared, (48, 32))
    expected = finish({"logits": logits, "sides": sides}, Placement((1.0, 1.0), (0, 0), (1000, 1000)))
    assert count == len(expected["boxes"]) > 10
    order = np.argsort(-boxes[:count, 4], kind="stable")
    np.testing.assert_allclose(boxes[:count][order][:, 4], expected["scores"], rtol=1e-5)
    assert boxes[:count][order][:, 5].tolist() == expected["labels"].tolist()
    np.testing.assert_allclose(boxes[:count][order][:, :4].clip(0), expected["boxes"], atol=1e-4)
