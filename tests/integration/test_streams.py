"""Recipes with a stream, whole: frames of a folder of images and of a video, timed by step on the target."""

import numpy as np
import pytest
from PIL import Image

from jetway.tasks.tracking.tracker import Tracker

pytestmark = pytest.mark.filterwarnings("default")

STEPS = ("capture", "preprocess", "infer", "postprocess", "end_to_end")
FRAMES = [np.full((48, 64), 40 * index, np.uint8) for index in range(5)]
SMALL = (
    "workload.options={size: 16, widths: [16, 16, 32], blocks: 1}", "train.epochs=1", "analyze.latency_runs=1",
    "variants=[baseline-fp32, baseline-int8-ptq]", "qat.calibration_samples=16", "verify.int8_atol=1", "gates=[]",
    "benchmark.min_duration_s=0.3", "benchmark.min_queries=50",
)  # fmt: skip


@pytest.fixture
def deployed(tmp_path, jetway_here, cli_home):
    """Runs the digits on frames of a source; gives the run and its tracker."""

    def deploy(source):
        stream = f"benchmark.stream={{source: '{source}', frames: 48}}"
        settings = [part for change in (*SMALL, stream) for part in ("--set", change)]
        run = jetway_here("run", "digits", "--json", *settings, cwd=tmp_path)
        assert run.exit_code in (0, 5), run.stderr
        return run, Tracker(f"sqlite:///{cli_home / 'mlflow.db'}")

    return deploy


def test_frames_of_images_and_of_a_video_are_timed_by_step(deployed, tmp_path):
    folder = tmp_path / "shots"
    folder.mkdir()
    for index, frame in enumerate(FRAMES):
        Image.fromarray(frame).save(folder / f"{index}.png")
    check_record(*deployed(folder), source="shots")

    video = tmp_path / "street.y4m"
    video.write_bytes(b"YUV4MPEG2 W64 H48 Cmono\n" + b"".join(b"FRAME\n" + f.tobytes() for f in FRAMES))
    run, tracker = deployed(video)
    check_record(run, tracker, source="street.y4m")
    assert {"load", "ptq"} <= set(run.stages(cached=True)), "other frames train nothing anew"


def check_record(run, tracker, *, source):
    """The breakdown, one frame at a time and pipelined, in --json, result.json, MLflow's metrics, and the report."""
    run_id = run.json["run_id"]
    session = tracker.load_json(run_id, "targets/loopback/stream.json")
    assert (session["source"], session["frame_size"]) == (source, [64, 48])
    rows = {row["variant"]: row["metrics"] for row in tracker.load_json(run_id, "result.json")["rows"]}
    children = {child.tags["variant"]: child.metrics for child in tracker.children(run_id)}
    assert set(session["variants"]) == set(rows) == {"baseline-fp32", "baseline-int8-ptq"}
    for variant, found in session["variants"].items():
        breakdown = {f"{step}_ms_p50": found["steps"][step]["p50_ms"] for step in STEPS}
        breakdown |= {"stream_fps": found["one_by_one_fps"]["value"]}
        breakdown |= {"stream_fps_pipelined": found["pipelined_fps"]["value"]}
        assert min(breakdown.values()) > 0
        for told in (rows[variant], children[variant], run.metrics(variant)):
            assert breakdown == {name: told[name] for name in breakdown}
    description = tracker.run(run_id).tags["mlflow.note.content"]
    assert f"ms at the median, of {source}, 64 x 48" in description
    report = (tracker.local_folder(run_id) / "report.html").read_text()
    assert f"A frame by step, of {source}, 64 × 48" in report
