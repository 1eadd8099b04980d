"""Frames on their way to an engine and from it, held against PyTorch and the workload's own tensors."""

import io
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from torch.nn import functional

from jetway.configs.schema import StreamConfig
from jetway.tasks.clip import evaluation_frames
from jetway.tasks.frames import FrameInput
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.frames import pipeline, postprocess, preprocess, resize, source
from jetway.tasks.workloads.detector import SceneDetector, decode_detections
from jetway.tasks.workloads.digits import DigitsClassifier
from jetway.tasks.workloads.mobilenet_v3 import CropClassifier
from jetway.tasks.workloads.segmenter import SceneSegmenter, upsample


def picture(height=12, width=20, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def preprocessor(**declared):
    return preprocess.Preprocessor(FrameInput(name="image", **declared).model_dump(mode="json"))


def by_torch(image, width, height):
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    return functional.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("size", [(20, 12), (7, 5), (33, 40), (1, 1), (20, 3)], ids=str)
def test_scaling_is_that_of_pytorch(size):
    image = picture()
    scaled = resize.bilinear(image, *size).transpose(2, 0, 1)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, by_torch(image, *size), atol=1e-3)


def test_a_frame_becomes_the_sample_of_the_workload():
    """The frame of a sample, to the nearest grey level, comes back as the sample within half a level."""
    workload = DigitsClassifier(size=32)
    declared = workload.frame_processing().input
    prepare = preprocess.Preprocessor(declared.model_dump(mode="json"))
    frames = evaluation_frames(workload, StreamConfig(clip_frames=4))
    for index, frame in enumerate(frames):
        pixels, _ = prepare(frame)
        sample = workload.evaluation_data()[index][0]["image"].numpy()
        assert pixels.shape == (1, *sample.shape)
        assert np.abs(pixels[0] - sample).max() <= 0.51 / declared.deviation[0]


def test_channels_are_ordered_and_scaled_one_by_one():
    frame = picture(2, 2)
    declared = {"size": (2, 2), "mean": (10, 20, 30), "deviation": (2, 4, 8)}
    rgb, _ = preprocessor(**declared)(frame)
    np.testing.assert_allclose(rgb[0, 2], (frame[:, :, 2] - 30.0) / 8)
    bgr, _ = preprocessor(**declared, colour="bgr")(frame)
    np.testing.assert_allclose(bgr[0, 2], (frame[:, :, 0] - 30.0) / 8)
    assert rgb.flags.c_contiguous
    assert bgr.flags.c_contiguous


def test_grey_is_the_luma_of_colours_and_colours_of_grey_are_grey():
    frame = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    grey, _ = preprocessor(size=(4, 4), colour="gray")(frame)
    np.testing.assert_allclose(grey, 0.299 * 200 + 0.587 * 100 + 0.114 * 50, rtol=1e-6)
    colours, _ = preprocessor(size=(4, 4))(picture(4, 4, 1))
    assert (colours[0, 0] == colours[0, 2]).all()


def test_uint8_inputs_take_grey_levels():
    frame = picture(4, 4)
    pixels, _ = preprocessor(size=(4, 4), dtype="uint8")(frame)
    assert pixels.dtype == np.uint8
    assert (pixels[0].transpose(1, 2, 0) == frame).all()


def test_a_frame_whose_aspect_is_kept_lies_in_the_middle_and_its_boxes_come_back():
    frame = np.full((50, 100, 3), 255, np.uint8)
    pixels, placement = preprocessor(size=(40, 40), keep_aspect=True, padding=7)(frame)
    assert (pixels[0, :, 10:30] == 255).all()
    assert (pixels[0, :, :10] == 7).all()
    assert (pixels[0, :, 30:] == 7).all()
    boxes = placement.to_frame(np.array([[0.0, 10, 40, 30], [10, 20, 20, 25], [-5, 0, 60, 40]]))
    np.testing.assert_allclose(boxes, [[0, 0, 100, 50], [25, 25, 50, 37.5], [0, 0, 100, 50]])


def test_boxes_of_a_stretched_frame_come_back():
    _, placement = preprocessor(size=(40, 40))(picture(80, 160))
    np.testing.assert_allclose(placement.to_frame(np.array([[10.0, 10, 20, 30]])), [[40, 20, 80, 60]])


def anywhere(width=32, height=32):
    return preprocess.Placement((1.0, 1.0), (0, 0), (width, height))


def test_classes_are_the_best_with_their_probability():
    logits = np.array([[0.0, 3.0, 1.0]], np.float32)
    made = postprocess.postprocess_of({"kind": "classes", "output": "logits", "top": 2}, (8, 8))
    found = made({"logits": logits}, anywhere())
    assert found["labels"].tolist() == [1, 2]
    np.testing.assert_allclose(
        found["scores"], torch.softmax(torch.from_numpy(logits[0]), 0)[[1, 2]], rtol=1e-6
    )


BOXES = {
    "kind": "boxes",
    "class_logits": "logits",
    "distances": "distances",
    "strides": [8, 16],
    "min_score": 0.5,
    "max_iou": 0.5,
    "class_agnostic": False,
}


def test_boxes_are_decoded_around_the_cells_of_each_level():
    """32 x 16 pixels have 4 x 2 cells of 8 pixels and then 2 x 1 of 16."""
    logits, distances = np.full((1, 3, 10), -9.0, np.float32), np.zeros((1, 4, 10), np.float32)
    logits[0, 2, 5], distances[0, :, 5] = 2.0, (0.5, 0.25, 1, 0.5)  # second row, second column: centre 12, 12
    logits[0, 0, 9], distances[0, :, 9] = 1.0, (1, 0.5, 0.5, 0.5)  # second of the coarse level: centre 24, 8
    found = postprocess.postprocess_of(BOXES, (32, 16))(
        {"logits": logits, "distances": distances}, anywhere(32, 16)
    )
    np.testing.assert_allclose(found["boxes"], [[8, 10, 20, 16], [8, 0, 32, 16]])
    np.testing.assert_allclose(found["scores"], 1 / (1 + np.exp([-2.0, -1.0])))
    assert found["labels"].tolist() == [2, 0]


def test_of_boxes_that_overlap_the_best_of_each_class_stays():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [30, 0, 40, 10]], np.float32)
    scores, labels = np.array([0.6, 0.9, 0.7, 0.55]), np.array([1, 1, 2, 1])
    assert postprocess.suppress(boxes, scores, labels, 0.5) == [1, 2, 3]
    assert postprocess.suppress(boxes, scores, labels, 0.9) == [1, 2, 0, 3]


def test_nothing_found_is_no_box():
    outputs = {"logits": np.full((1, 3, 10), -9, np.float32), "distances": np.zeros((1, 4, 10), np.float32)}
    assert postprocess.postprocess_of(BOXES, (32, 16))(outputs, anywhere())["boxes"].shape == (0, 4)


@pytest.mark.parametrize(("upsample", "size"), [(True, (12, 20)), (False, (3, 5))])
def test_masks_are_the_argmax_of_logits_scaled_as_asked(upsample, size):
    logits = np.random.default_rng(0).standard_normal((1, 4, 3, 5)).astype(np.float32)
    made = postprocess.postprocess_of({"kind": "masks", "output": "logits", "upsample": upsample}, (20, 12))
    mask = made({"logits": logits}, anywhere())["mask"]
    expected = functional.interpolate(torch.from_numpy(logits), size=size, mode="bilinear")[0].argmax(0)
    assert mask.shape == size
    assert (mask == expected.numpy()).all()


def pnm(image):
    kind = b"P6" if image.shape[2] == 3 else b"P5"
    return kind + b"\n# made here\n%d %d\n255\n" % (image.shape[1], image.shape[0]) + image.tobytes()


def y4m(frames, chroma):
    """A video whose colour differences are given as they are stored."""
    height, width = frames[0][0].shape
    text = b"YUV4MPEG2 W%d H%d F25:1 Ip A1:1 C%s\n" % (width, height, chroma.encode())
    return text + b"".join(b"FRAME\n" + b"".join(plane.tobytes() for plane in planes) for planes in frames)


def read(tmp_path, data, count):
    path = tmp_path / "frames"
    path.write_bytes(data)
    frames = source.FrameSource(str(path))
    return [frames.read() for _ in range(count)]


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_and_folders_of_images_are_read_again_when_they_are_over(tmp_path, channels):
    images = np.stack([picture(4, 6, channels, seed=seed) for seed in range(2)])
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, images)
    with zipfile.ZipFile(archive, "w") as file:
        for name, image in zip(("b.ppm", "a.ppm"), images[::-1], strict=True):
            file.writestr(name, pnm(image))
    for data in (array.getvalue(), archive.getvalue()):
        frames = read(tmp_path, data, 3)
        assert (np.stack(frames) == images[[0, 1, 0]]).all()


def test_compressed_images_are_decoded_where_something_can(tmp_path, monkeypatch):
    image_module = pytest.importorskip("PIL.Image")
    image, data = picture(), io.BytesIO()
    image_module.fromarray(image).save(data, "png")
    assert (read(tmp_path, data.getvalue(), 1)[0] == image).all()
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DeviceError, match=r"needs OpenCV .* or Pillow") as caught:
        read(tmp_path, data.getvalue(), 1)
    assert caught.value.kind == "mismatch"


@pytest.mark.parametrize(
    ("chroma", "across", "down"), [("420jpeg", 2, 2), ("420", 2, 2), ("422", 2, 1), ("444", 1, 1)]
)
def test_videos_have_their_colours(tmp_path, chroma, across, down):
    """Odd sizes round their planes of colour up. Red has a luma of 81 and colour differences of 90 and 240."""
    height, width = 5, 7
    size = (-(-height // down), -(-width // across))
    planes = [np.full((height, width), 81), np.full(size, 90), np.full(size, 240)]
    data = y4m([[plane.astype(np.uint8) for plane in planes]] * 2, chroma)
    for frame in read(tmp_path, data, 3):
        assert frame.shape == (height, width, 3)
        assert np.abs(frame.astype(int) - (254, 0, 0)).max() <= 1


def test_videos_without_colours_are_grey(tmp_path):
    luma = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (read(tmp_path, y4m([[luma]], "mono"), 1)[0][:, :, 0] == luma).all()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"P6\n4 4\n255\n123", "cut off"),
        (b"P6\n4 4\n65535\n" + bytes(96), "up to 255"),
        (y4m([[np.zeros((4, 4), np.uint8)]], "420"), "cut off"),
        (y4m([[np.zeros((4, 4), np.uint8)]], "420p10"), "420p10"),
        (b"YUV4MPEG2 W4 H4 Cmono\n", "no frame"),
    ],
    ids=["image", "depth", "video", "colours", "empty"],
)
def test_what_cannot_be_read_says_so(tmp_path, data, what):
    with pytest.raises(DeviceError, match=what) as caught:
        read(tmp_path, data, 1)
    assert caught.value.kind == "bad_request"


def test_arrays_of_another_kind_are_refused(tmp_path):
    data = io.BytesIO()
    np.save(data, np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(DeviceError, match="float32"):
        read(tmp_path, data.getvalue(), 1)


def test_a_video_needs_opencv(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DeviceError, match=r"needs OpenCV.*y4m"):
        read(tmp_path, b"\0\0\0\x18ftypmp42" + bytes(64), 1)


class Slow:
    """Stands for each step of a pipeline: it takes its time, and waiting leaves the core to others."""

    output_names = ("logits",)

    def __init__(self, seconds, fails_at=None):
        self.seconds, self.fails_at, self.calls = seconds, fails_at, 0

    def work(self, result):
        time.sleep(self.seconds)
        self.calls += 1
        if self.calls == self.fails_at:
            raise DeviceError("broken")
        return result

    def read(self):
        return self.work(picture(2, 2))

    def inputs_of(self, tensors):
        return tensors

    def run(self, inputs):
        return self.work([np.zeros((1, 3), np.float32)])

    def __call__(self, outputs, placement):
        return self.work(outputs)


def slow_pipeline(seconds=0.005, **fails):
    steps = [Slow(seconds, fails.get(step)) for step in ("capture", "infer", "finish")]
    return pipeline.Pipeline(steps[0], preprocessor(size=(2, 2)), steps[1], steps[2], "image"), steps


def test_steps_side_by_side_take_as_long_as_the_slowest():
    one, steps = slow_pipeline()
    elapsed_s = pipeline.run_side_by_side(one, 20, 2) / 1e9
    assert [step.calls for step in steps] == [20, 20, 20]
    assert 19 * 0.005 <= elapsed_s < 19 * 0.005 * 2


def test_steps_in_turn_are_timed_one_by_one():
    one, _ = slow_pipeline(0.002)
    times_ns = {step: [] for step in pipeline.STEPS}
    pipeline.run_in_turn(one, 5, times_ns)
    for step in ("capture", "infer", "postprocess"):
        assert len(times_ns[step]) == 5
        assert min(times_ns[step]) >= 2e6
    assert np.median(times_ns["preprocess"]) < 2e6


@pytest.mark.parametrize("step", ["capture", "infer", "finish"])
def test_a_step_that_fails_ends_all(step):
    """Nobody waits for room in a queue that is not emptied any more."""
    one, _ = slow_pipeline(0.0, **{step: 3})
    with pytest.raises(DeviceError, match="broken"):
        pipeline.run_side_by_side(one, 50, 1)


@pytest.mark.parametrize("made", [SceneDetector, SceneSegmenter, CropClassifier])
def test_frames_of_scenes_become_samples(made):
    workload = made(scenes=(2, 2, 2))
    prepare = preprocess.Preprocessor(workload.frame_processing().input.model_dump(mode="json"))
    frames = evaluation_frames(workload, StreamConfig(clip_frames=2))
    for index, frame in enumerate(frames):
        sample = workload.evaluation_data()[index][0]["image"].numpy()
        np.testing.assert_allclose(prepare(frame)[0][0], sample, atol=1e-6)


def test_boxes_on_the_device_are_those_that_the_host_scores():
    """Of a detector without training, whose many boxes overlap."""
    torch.manual_seed(0)
    workload = SceneDetector(size=64, widths=(16, 32, 32), neck=32, scenes=(1, 1, 2))
    declared = workload.frame_processing()
    finish = postprocess.postprocess_of(declared.results.model_dump(mode="json"), declared.input.size)
    generator = np.random.default_rng(0)
    cells = len(workload.cells.stride)
    outputs = {
        "class_logits": generator.normal(-2, 2, (1, 10, cells)).astype(np.float32),
        "distances": generator.uniform(0, 3, (1, 4, cells)).astype(np.float32),
    }
    found = finish(outputs, anywhere(64, 64))
    boxes, scores, labels = decode_detections(
        outputs["class_logits"][0], outputs["distances"][0], workload.cells
    )
    assert len(boxes) > 20
    assert found["labels"].tolist() == labels.tolist()
    np.testing.assert_allclose(found["scores"], scores)
    np.testing.assert_allclose(found["boxes"], np.clip(boxes, 0, 64), atol=1e-4)


def test_masks_on_the_device_are_those_that_the_host_scores():
    workload = SceneSegmenter(size=32, scenes=(1, 1, 1))
    declared = workload.frame_processing()
    finish = postprocess.postprocess_of(declared.results.model_dump(mode="json"), declared.input.size)
    logits = np.random.default_rng(0).standard_normal((1, 11, 8, 8)).astype(np.float32)
    mask = finish({"logits": logits}, anywhere())["mask"]
    assert (mask == upsample(torch.from_numpy(logits), 32)[0].argmax(dim=0).numpy()).all()
