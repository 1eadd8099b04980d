"""What ``jetway check`` and ``run`` refuse before a network is trained, and what ``probe`` shows."""

from pathlib import Path

import pytest

from jetway.configs.load import load_recipe
from jetway.configs.schema import Recipe
from jetway.flows.check import check_recipe, check_recipe_fits, check_without_targets, facts
from jetway.tasks.errors import ConfigError, WorkloadError
from jetway.tasks.target_info import TargetInfo


def recipe(**tensorrt):
    return Recipe(
        name="r",
        workload={"class_path": "small_networks:SmallWorkload"},
        train={},
        variants=["baseline-fp32", "baseline-fp16"],
        tensorrt=tensorrt,
    )


def test_a_layer_pattern_that_matches_a_node_is_accepted(small_workload):
    check_recipe_fits(recipe(mixed={"*stem*": "fp32"}), Path("r.yaml"), small_workload())


def test_a_layer_pattern_that_matches_nothing_is_refused_before_training(small_workload):
    with pytest.raises(ConfigError, match=r"tensorrt\.mixed.*'/stemm/\*'.*Nearest: .*stem"):
        check_recipe_fits(recipe(mixed={"/stemm/*": "fp32"}), Path("r.yaml"), small_workload())


def test_a_profile_of_another_shape_is_refused_before_training(small_workload):
    shapes = {"min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [4, 3, 9, 9]}
    with pytest.raises(ConfigError, match=r"tensorrt\.profiles\.0\.x"):
        check_recipe_fits(recipe(profiles=[{"x": shapes}]), Path("r.yaml"), small_workload())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"depth": {"keep": {"blcks": 2}}}}, r"prune\.depth\.keep: 'blcks' .*Nearest: 'blocks'"),
        ({"prune": {"head_ratios": {"attn": 0.5}}}, r"prune\.head_ratios: 'attn' .*blocks\.0\.attn"),
        ({"qat": {"distillation": {"features": ["blcks"]}}}, r"distillation\.features: 'blcks' .*blocks"),
        ({"qat": {"calibration_set": "night"}}, r"calibration_sets\(\) has no 'night'. It has default"),
    ],
    ids=["depth", "heads", "features", "calibration set"],
)
def test_what_compression_cannot_find_is_refused_before_training(small_workload, changes, message):
    asked = Recipe(
        name="r",
        workload={"class_path": "small_networks:SmallWorkload"},
        train={},
        variants=["baseline-fp32", "pruned-int8-qat"],
        **changes,
    )
    with pytest.raises(ConfigError, match=message):
        check_recipe_fits(asked, Path("r.yaml"), small_workload(network="Swin"))


@pytest.mark.parametrize(
    "asked",
    [
        {"variants": ["baseline-fp32", "baseline-int8-ptq-smoothquant"]},
        {"variants": ["baseline-fp32", "baseline-int8-qat"], "qat": {"calibration": "smoothquant"}},
    ],
    ids=["variant", "recipe"],
)
def test_smoothquant_without_a_layer_norm_is_refused_before_training(small_workload, asked):
    asked = Recipe(name="r", workload={"class_path": "small_networks:SmallWorkload"}, train={}, **asked)
    check_recipe_fits(asked, Path("r.yaml"), small_workload(network="Swin"))
    with pytest.raises(ConfigError, match=r"^baseline-int8-.*: smoothquant finds nothing .*Choose .*entropy"):
        check_recipe_fits(asked, Path("r.yaml"), small_workload())


ODD = """
import torch
from jetway.tasks.workloads.digits import DigitsClassifier

class Odd(DigitsClassifier):
    def qat_data(self):
        return [({"image": torch.zeros(1, 3, 3)}, 0)]
"""


def test_training_data_of_another_shape_are_refused_by_a_check(tmp_path):
    (tmp_path / "odd_data.py").write_text(ODD)
    odd = Recipe(name="r", workload={"class_path": "odd_data:Odd"}, train={}, variants=["baseline-fp32"])
    with pytest.raises(WorkloadError, match=r"Odd\.qat_data\(\)\[0\] gives 'image' as .*\[1, 3, 3\]"):
        check_recipe(odd, tmp_path / "r.yaml", [])


CLASSIFIER = """
name: reader
extends: mobilenet_v3
workload:
  class_path: jetway.tasks.workloads.mobilenet_v3:CropClassifier
  options: {size: 32, variant: small, width: 0.5, round_to: 16, scenes: [4, 4, 4]}
"""
CASCADE = """
name: mine
extends: detector
variants: [baseline-fp32, pruned-int8-qat]
gates: []
cascade: {classifier: reader}
workload:
  class_path: jetway.tasks.workloads.detector:SceneDetector
  options: {size: 64, widths: [16, 32, 32], neck: 32, scenes: [4, 4, 4]}
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prune: {ignored_layers: [sixth]}", r"prune\.ignored_layers.*sixth"),
        ("qat: {calibration: smoothquant}", "smoothquant finds nothing"),
        ("qat: {calibration_set: night}", "has no 'night'"),
    ],
    ids=["pruning", "smoothing", "calibration set"],
)
def test_a_classifier_that_cannot_be_is_refused_before_the_detector_is_trained(change, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(CASCADE)
    (tmp_path / "reader.yaml").write_text(CLASSIFIER)
    recipe, path = load_recipe(str(tmp_path / "mine.yaml"))
    check_without_targets(recipe, path)
    (tmp_path / "reader.yaml").write_text(f"{CLASSIFIER}{change}\n")
    with pytest.raises(ConfigError, match=rf"cascade\.classifier reader: .*{message}"):
        check_without_targets(recipe, path)


def info(**changes):
    gpu = {"name": "ga10b", "compute_capability": "8.7", "multiprocessors": 16}
    tensorrt = {"available": True, "version": "10.3.0", "gpu": gpu, "dla_cores": 2}
    values = {
        "schema_version": 1,
        "hostname": "orin",
        "os": "Ubuntu 22.04",
        "kernel": "5.15",
        "python": "3.10.12",
        "board": "NVIDIA Jetson AGX Orin Developer Kit",
        "l4t": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic",
        "boot_id": "b",
        "cpu": {
            "model": "Arm",
            "architecture": "aarch64",
            "instruction_sets": [],
            "int8_instruction_sets": [],
        },
        "cores": 12,
        "memory_mib": {"total": 62000.0, "available": 55000.0},
        "free_disk_mib": 9000.0,
        "frequencies_mhz": {},
        "accelerators": {},
        "engines": {"tensorrt": tensorrt, "onnxruntime": {"available": False, "reason": "No module"}},
    }
    return TargetInfo.model_validate(values | changes)


def test_probe_shows_what_tensorrt_can_do_and_where_it_is_known_from():
    shown = dict(facts(info()))
    assert shown["JetPack"].startswith(
        "6.1, 6.2, which brings Python 3.10, TensorRT 10.3.0, CUDA 12.6 (not verified"
    )
    assert shown["ONNX opset"].startswith("up to 20 (not verified")
    assert shown["precisions"] == "fp32, fp16, bf16, int8-ptq, int8-qat, int8-calibrated"
    assert shown["DLA cores"] == "2"
    assert "VDD_GPU_SOC" in shown["power rails"]
    assert shown["onnxruntime"] == "not there: No module"
    assert "compute capability 8.7" in shown["machine"]


def test_probe_says_what_a_sum_of_rails_counts_and_what_it_leaves_out():
    rails = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")
    power = {"rails": rails, "counted_rails": rails[:3], "total": "sum_of_rails"}
    assert dict(facts(info(power=power)))["power"] == (
        "no rail of the whole; sum_of_rails is VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0; VDDQ_VDD2_1V8AO left out, as "
        "another of them feeds it (not verified)"
    )
    power = {"rails": ("VDD_IN", "VDD_SOC"), "counted_rails": ("VDD_IN",), "total": "VDD_IN"}
    assert dict(facts(info(power=power)))["power"] == "VDD_IN, VDD_SOC; of the whole: VDD_IN"


def test_probe_says_why_a_precision_is_missing():
    engine = info().engines["tensorrt"].model_dump() | {"version": "11.1.0"}
    shown = dict(facts(info(engines={"tensorrt": engine, "onnxruntime": {"available": False}})))
    assert "no calibrator" in shown["not int8-calibrated"]


def test_probe_says_that_a_machine_is_simulated():
    assert dict(facts(info(simulated=True)))["machine"].startswith("SIMULATED ")
    engine = info().engines["tensorrt"].model_dump() | {"double": True}
    shown = dict(facts(info(engines={"tensorrt": engine, "onnxruntime": {"available": False}})))
    assert "test double" in shown["tensorrt"]
    assert shown["machine"].startswith("SIMULATED ")
