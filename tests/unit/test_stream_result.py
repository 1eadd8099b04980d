import csv
import io

import numpy as np
import pytest
from safetensors.numpy import save_file

from jetway.tasks.artifacts import Tensors
from jetway.tasks.results import MEASURED_METRICS, Validity
from jetway.tasks.stream_result import STEPS, StreamResult, measure_streams, stream_csv, stream_markdown

ROUNDS, SLICE = 12, 62
MS = 1_000_000


@pytest.fixture
def variants(tmp_path):
    """Steps of 1, 2, 3 and 4 ms; ten times as long in round 3, which is excluded; 5 ms a frame side by side."""
    rounds = np.repeat(np.arange(ROUNDS, dtype=np.int32), SLICE)
    arrays = {"net.round": rounds}
    for index, step in enumerate(STEPS):
        arrays[f"net.{step}_ns"] = np.where(rounds == 3, 10, 1) * np.int64((index + 1) * MS)
    save_file(arrays, tmp_path / "samples.safetensors")
    side_by_side_ns = [(SLICE - 1) * 5 * MS * (10 if index == 3 else 1) for index in range(ROUNDS)]
    result = {
        "rounds": ROUNDS,
        "excluded_rounds": [3],
        "slice_frames": SLICE,
        "side_by_side_ns": {"net": side_by_side_ns},
    }
    return measure_streams(tmp_path / "samples.safetensors", ["net"], result, seed=0)


def test_steps_and_rates_come_from_the_counted_rounds(variants):
    metrics = variants["net"].metrics()
    assert metrics["capture_ms_p50"] == 1
    assert metrics["preprocess_ms_p50"] == 2
    assert metrics["infer_ms_p50"] == 3
    assert metrics["postprocess_ms_p50"] == 4
    assert metrics["end_to_end_ms_p50"] == metrics["end_to_end_ms_p99"] == 10
    assert metrics["stream_fps"] == pytest.approx(100)
    assert metrics["stream_fps_pipelined"] == pytest.approx(200)
    assert variants["net"].steps["infer"].count == (ROUNDS - 1) * SLICE


def test_every_figure_is_a_metric_that_gates_know(variants):
    assert set(variants["net"].metrics()) <= set(MEASURED_METRICS)
    assert set(variants["net"].intervals()) <= set(variants["net"].metrics())


def result_of(variants, **changes):
    handle = Tensors(sha256="0" * 64, size_bytes=1)
    values = {
        "target": "loopback",
        "variants": variants,
        "validity": Validity(),
        "source": "video.y4m",
        "source_sha256": "1" * 64,
        "frame_size": (640, 480),
        "samples": handle,
        "rounds": ROUNDS,
        "excluded_rounds": (3,),
        "slice_frames": SLICE,
        "queue_frames": 2,
        "boot_id": "",
    }
    return StreamResult(**{**values, **changes})


def test_the_table_says_where_and_what_was_measured(variants):
    text = stream_markdown(result_of(variants), where="loopback: a machine")
    assert "loopback: a machine" in text
    assert "video.y4m, 640 x 480" in text
    assert "INVALID" not in text
    assert text.splitlines()[-1].split(" | ")[1:] == [
        "1.000", "2.000", "3.000", "4.000", "10.000", "10.000", "100.0", "200.0 |",
    ]  # fmt: skip
    disturbed = result_of(variants, validity=Validity(valid=False, reasons=("frames: disturbed",)))
    assert "INVALID: frames: disturbed" in stream_markdown(disturbed, where="here")


def test_the_file_has_every_step_with_its_percentiles(variants):
    rows = list(csv.DictReader(io.StringIO(stream_csv(result_of(variants)))))
    assert [row["step"] for row in rows] == [*STEPS, "end_to_end"]
    assert float(rows[0]["p90_ms"]) == 1
    assert float(rows[-1]["mean_ms"]) == 10


def test_a_row_is_as_valid_as_all_its_measurements():
    invalid = Validity(valid=False, reasons=("frames: disturbed",))
    assert Validity().joined(invalid) == invalid
    assert Validity().joined(Validity()) == Validity()
    assert Validity(valid=False, reasons=("hot",)).joined(invalid).reasons == ("hot", "frames: disturbed")
