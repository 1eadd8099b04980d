import zipfile

import numpy as np
import pytest
from PIL import Image

from jetway.configs.schema import StreamConfig
from jetway.tasks.clip import check_stream, make_clip
from jetway.tasks.errors import ConfigError, WorkloadError
from jetway.tasks.frames import Classes, FrameInput, FrameProcessing
from jetway.tasks.store import Store
from jetway.tasks.workloads.digits import DigitsClassifier


class Undeclared(DigitsClassifier):
    def frame_processing(self):
        return None


class OtherSize(DigitsClassifier):
    def frame_processing(self):
        image = FrameInput(name="image", size=(8, 8), colour="gray")
        return FrameProcessing(input=image, results=Classes(output="logits"))


class OtherOutput(DigitsClassifier):
    def frame_processing(self):
        return super().frame_processing().model_copy(update={"results": Classes(output="scores")})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def workload():
    return DigitsClassifier(size=16)


@pytest.mark.parametrize(
    ("made", "error", "what"),
    [
        (Undeclared, ConfigError, r"needs Undeclared.frame_processing\(\)"),
        (OtherSize, WorkloadError, r"\(1, 1, 8, 8\).*\(1, 1, 16, 16\)"),
        (OtherOutput, WorkloadError, r"\['scores'\]"),
    ],
)
def test_a_workload_that_cannot_take_frames_is_refused_before_anything_runs(made, error, what):
    with pytest.raises(error, match=what):
        check_stream(StreamConfig(), None, made(size=16))
    check_stream(None, None, made(size=16))


def test_a_source_that_is_not_there_is_refused(tmp_path, workload):
    with pytest.raises(ConfigError, match="is not there"):
        check_stream(StreamConfig(source="video.y4m"), tmp_path / "video.y4m", workload)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds no image.*\.png"):
        check_stream(StreamConfig(source="."), tmp_path, workload)


def test_frames_of_the_evaluation_data_have_the_size_asked_for(store, workload):
    clip = make_clip(store, workload, StreamConfig(clip_frames=5, frame_size=(64, 48)), None)
    frames = np.load(store.open(clip))
    assert frames.shape == (5, 48, 64, 1)
    assert frames.dtype == np.uint8
    assert len(np.unique(frames)) > 16
    assert clip.metadata == {"source": "evaluation data"}
    assert clip == make_clip(store, workload, StreamConfig(clip_frames=5, frame_size=(64, 48)), None)


def test_a_folder_of_images_is_sent_as_one_file_and_stays(store, workload, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "notes.txt").touch()
    clip = make_clip(store, workload, StreamConfig(source="images"), folder)
    with zipfile.ZipFile(store.open(clip)) as archive:
        assert archive.namelist() == ["a.jpg", "b.png"]
        assert archive.read("b.png") == (folder / "b.png").read_bytes()
    assert clip == make_clip(store, workload, StreamConfig(source="images"), folder)


def test_a_video_is_sent_as_it_is_and_stays(store, workload, tmp_path):
    video = tmp_path / "video.y4m"
    video.write_bytes(b"YUV4MPEG2 W4 H4 Cmono\n")
    clip = make_clip(store, workload, StreamConfig(source="video.y4m"), video)
    assert store.open(clip).read_bytes() == video.read_bytes()
    assert clip.metadata == {"source": "video.y4m"}
