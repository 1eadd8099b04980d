"""Recipes of more than one network, input or output, small and whole: from training to their record in MLflow."""

import zipfile

import onnx
import pytest
import yaml

from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.workloads.detector import SceneDetector

pytestmark = pytest.mark.filterwarnings("default")

# What is hardly trained leads small differences on to large ones; parity has tests of its own.
LENIENT = 4
QUICK = (
    "finetune.epochs=1", "qat.epochs=1", "qat.calibration_samples=8", "gates=[]",
    f"verify.int8_atol={LENIENT}", "verify.samples=8", "benchmark.min_duration_s=0.3", "benchmark.min_queries=50",
    "analyze.latency_runs=1", "variants=[baseline-fp32, pruned-int8-qat]",
)  # fmt: skip
DETECTOR = {"size": 64, "widths": [16, 32, 32], "neck": 32, "scenes": [384, 8, 24]}
CLASSIFIER = {
    "name": "reader",
    "workload": {
        "class_path": "jetway.tasks.workloads.mobilenet_v3:CropClassifier",
        "options": {"size": 32, "width": 0.5, "round_to": 16, "scenes": [400, 8, 16]},
    },
    "train": {"epochs": 4, "batch_size": 32, "learning_rate": 4.0e-3, "schedule": "one_cycle"},
    "prune": {"target_macs_ratio": 0.7, "round_to": 16},
    "finetune": {"epochs": 1},
    "qat": {"epochs": 1, "calibration_samples": 8},
    "verify": {"int8_atol": LENIENT, "samples": 8},
    "analyze": {"latency_runs": 1},
    "variants": ["baseline-fp32"],
}
STEPS = ("capture", "detect", "boxes", "crop", "classify", "end_to_end")


@pytest.fixture
def deployed(tmp_path, jetway_here, cli_home):
    """Runs a recipe with some keys changed; gives the run and its tracker."""

    def deploy(recipe, *changes):
        settings = [part for change in (*QUICK, *changes) for part in ("--set", change)]
        run = jetway_here("run", recipe, "--json", *settings, cwd=tmp_path)
        assert run.exit_code in (0, 5), run.stderr
        assert [row["variant"] for row in run.json["variants"]] == ["baseline-fp32", "pruned-int8-qat"]
        return run, Tracker(f"sqlite:///{cli_home / 'mlflow.db'}")

    return deploy


def test_a_cascade_is_deployed_as_one_unit_with_two_engines(deployed, tmp_path):
    (tmp_path / "reader.yaml").write_text(yaml.safe_dump(CLASSIFIER))
    run, tracker = deployed(
        "cascade",
        f"workload.options={DETECTOR}",
        "train.epochs=6",
        "train.batch_size=8",
        "prune.target_macs_ratio=0.7",
        "cascade.classifier=reader.yaml",
        "cascade.min_score=0.02",
    )
    run_id = run.json["run_id"]
    session = tracker.load_json(run_id, "targets/loopback/cascade.json")
    children = {child.tags["variant"]: child for child in tracker.children(run_id)}
    for variant, found in session["variants"].items():
        assert set(found["steps"]) == set(STEPS)
        check_row(run.metrics(variant), found)
        measured = children[variant].metrics
        assert measured == pytest.approx(measured | run.metrics(variant)), "MLflow has what --json tells"
        records = tracker.load_json(run_id, f"targets/loopback/cascade/{variant}.records.json")
        assert len(records) == DETECTOR["scenes"][2]
        assert SceneDetector(**DETECTOR).summarize(records) == pytest.approx(found["scores"])
    assert run.metrics("pruned-int8-qat")["cascade_size_ratio"] < 1
    report = report_of(tracker, run_id)
    assert "Detector and classifier as one, by step" in report
    check_calibration(tracker, run_id, report)
    check_package(tracker, run_id)


def check_row(metrics, found):
    """End-to-end accuracy, latency, and times by step stand in the row."""
    assert metrics["cascade_map50"] == found["scores"]["map50"] > 0.01
    medians = {step: times["p50_ms"] for step, times in found["steps"].items()}
    assert 0 < min(medians.values()) < max(medians.values()) == medians["end_to_end"]
    assert metrics["cascade_ms_p50"] == medians["end_to_end"]
    assert metrics["cascade_detect_ms_p50"] == medians["detect"]
    assert metrics["cascade_classify_ms_p50"] == medians["classify"]
    assert metrics["cascade_size_bytes"] > metrics["size_bytes"], "of both engines"
    assert found["objects"] > 0


def check_package(tracker, run_id):
    """One package with an engine of each."""
    variant = tracker.run(run_id).tags["package.loopback"]
    path = tracker.local_folder(run_id) / "targets/loopback/package.zip"
    with zipfile.ZipFile(path) as package:
        engines = [package.read(name) for name in ("model.engine", "classifier/model.engine")]
    row = next(c for c in tracker.children(run_id) if c.tags["variant"] == variant)
    assert sum(map(len, engines)) == row.metrics["cascade_size_bytes"]


def check_calibration(tracker, run_id, report):
    """The coverage of scenes is an artifact, a metric and a part of the report."""
    found = tracker.load_json(run_id, "calibration/default.json")
    assert len(found["scenes"]) > 1
    assert 0 < tracker.run(run_id).metrics["calibration.default.scene_coverage_ratio"] < 1
    assert f"Set default: 8 samples, sha256 {found['sha256'][:16]}" in report
    assert all(scene in report for scene in found["scenes"])


def report_of(tracker, run_id):
    return (tracker.local_folder(run_id) / "report.html").read_text()


BEV = {
    "cameras": 2, "image_size": [48, 96], "cells": 12, "channels": 16, "dims": [16, 32], "depths": [1, 2],
    "num_heads": [2, 4], "frames": 32, "evaluation_frames": 24,
}  # fmt: skip


def test_cameras_and_lidar_are_deployed_as_two_inputs_of_one_engine(deployed):
    depth = "{keep: {image_encoder.stages.1.blocks: 1}}"
    run, tracker = deployed(
        "bev_fusion", f"workload.options={BEV}", "train.epochs=2", f"prune.depth={depth}", "prune.round_to=8"
    )
    baseline, smallest = run.metrics("baseline-fp32"), run.metrics("pruned-int8-qat")
    assert smallest["macs"] < 0.8 * baseline["macs"]
    assert smallest["size_bytes"] < 0.8 * baseline["size_bytes"]
    for child in tracker.children(run.json["run_id"]):
        graph = onnx.load(tracker.local_folder(child.run_id) / "model.onnx").graph
        assert [one.name for one in graph.input] == ["images", "pillars"]
        assert [one.name for one in graph.output] == ["heatmap", "boxes", "segmentation"]
        assert {"map", "miou", "map_drop", "miou_drop", "latency_ms_p50"} <= set(child.metrics)
        assert 0 < child.metrics["miou"] <= 1
    assert "map against latency" in report_of(tracker, run.json["run_id"])
