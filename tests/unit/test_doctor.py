"""The doctor's judgements, each on a target that passes and on one that does not; and what a report leaves out."""

import json

import numpy as np
import pytest
import torch

from jetway.configs.schema import Precision, Target
from jetway.flows.doctor import anonymizer_for
from jetway.tasks.artifacts import Engine
from jetway.tasks.checks import Outcome
from jetway.tasks.doctor import (
    Anonymizer,
    possible_cases,
    precision_check,
    report_markdown,
    target_checks,
    target_facts,
    trtexec_check,
)
from jetway.tasks.target_info import TargetInfo
from jetway.tasks.target_state import (
    lease_check,
    power_mode_check,
    rails_check,
    room_check,
    sensors_check,
    supply_check,
)
from jetway.tasks.tiny_networks import TINY_NETWORKS, TinyWorkload, error_ratio
from jetway.tasks.workload import check_workload, evaluate_network

PASS, FAIL, SKIPPED = Outcome.PASS, Outcome.FAIL, Outcome.SKIPPED
TENSORRT = Target(name="orin", host="orin.example", engine="tensorrt")


def info(version="10.3.0", board="NVIDIA Jetson Orin Nano Developer Kit", **changes):
    """A probe's answer, made up."""
    return TargetInfo.model_validate(
        {
            "schema_version": 1, "hostname": "orin-7", "os": "Ubuntu 22.04", "kernel": "5.15", "python": "3.10.12",
            "board": board, "l4t": "# R36 (release), REVISION: 4.3", "boot_id": "b", "cores": 6,
            "cpu": {"model": "A78AE", "architecture": "aarch64", "instruction_sets": [], "int8_instruction_sets": []},
            "memory_mib": {"total": 7600.0, "available": 5000.0}, "free_disk_mib": 9000.0, "frequencies_mhz": {},
            "accelerators": {"tensorrt": "1421022"},
            "engines": {
                "onnxruntime": {"available": False, "reason": "No module named 'onnxruntime'"},
                "tensorrt": {"available": version is not None, "version": version, "reason": "absent"},
            },
            **changes,
        }
    )  # fmt: skip


def test_every_precision_that_the_board_has_is_tried():
    cases, refused = possible_cases(TENSORRT, info())
    assert [case.name for case in cases] == ["fp32", "fp16", "bf16", "int8-ptq", "int8-calibrated"]
    assert refused == []


def test_what_the_board_lacks_is_skipped_with_the_reason():
    nano = info("8.2.1", "NVIDIA Jetson Nano Developer Kit", l4t="# R32 (release), REVISION: 7.1")
    cases, refused = possible_cases(TENSORRT, nano)
    assert [case.name for case in cases] == ["fp32", "fp16"]
    assert [check.name for check in refused] == ["bf16", "int8-ptq", "int8-calibrated"]
    assert all(check.verdict is SKIPPED for check in refused)
    assert "5.3 and no int8 kernels" in refused[1].evidence


def test_a_dla_is_tried_where_the_board_has_one():
    agx = info("8.6.2", "NVIDIA Jetson AGX Orin Developer Kit", l4t="# R36 (release), REVISION: 3.0")
    cases, refused = possible_cases(TENSORRT, agx)
    assert [case.name for case in cases if case.tensorrt.dla] == ["fp16 on DLA", "int8-calibrated on DLA"]
    assert [check.name for check in refused] == ["bf16"]


def test_without_the_engine_there_is_nothing_to_try():
    cases, (engine,) = possible_cases(TENSORRT, info(version=None))
    assert cases == []
    assert engine.verdict is FAIL
    assert "tensorrt is not there for python3. absent" in engine.evidence


def test_a_simulated_target_says_so():
    names = [check.name for check in target_checks(TENSORRT, info(simulated=True))]
    assert names == ["connection", "engine", "real device"]


ENGINE = Engine(sha256="0" * 64, size_bytes=9, metadata={"build_s": 1.0, "integer_macs_ratio": 0.5})


@pytest.mark.parametrize(
    ("precision", "error", "verdict"),
    [("fp32", 0.001, PASS), ("fp32", 0.002, FAIL), ("int8-ptq", 0.05, PASS), ("int8-ptq", 0.051, FAIL)],
)
def test_each_precision_has_its_own_tolerance(precision, error, verdict):
    check = precision_check("conv", Precision(precision), error, ENGINE)
    assert check.verdict is verdict
    assert "allowed" in check.evidence
    assert ("50% of the MACs in integers" in check.evidence) == (precision != "fp32")


def state(**sensors):
    return {"sensors": sensors, "power_total": "VDD_IN"}


@pytest.mark.parametrize(
    ("check", "verdict", "evidence"),
    [
        (lease_check({"problem": "", "holder": None}), PASS, "free"),
        (lease_check({"problem": "", "holder": {"since": "noon"}}), PASS, "held by another job since noon"),
        (lease_check({"problem": "no folder", "holder": None}), FAIL, "no folder"),
        (room_check("disk", 512, 512), PASS, "512 MiB free"),
        (room_check("disk", 511, 512), FAIL, "min_free_disk_mib"),
        (room_check("memory", None, 512), SKIPPED, "does not tell"),
        (supply_check({"over_current_events": {}, "low_voltage_alarm": None}), SKIPPED, "counts neither"),
        (supply_check({"over_current_events": {"oc1": 0}, "low_voltage_alarm": None}), PASS, "oc1 0"),
        (supply_check({"over_current_events": {"oc1": 2}, "low_voltage_alarm": None}), FAIL, "stronger supply"),
        (supply_check({"over_current_events": {"oc1": 0, "oc3": 9}, "low_voltage_alarm": None}), PASS, "oc3 9"),
        (supply_check({"over_current_events": {}, "low_voltage_alarm": 1}), FAIL, "stronger supply"),
        (supply_check({"over_current_events": {}, "low_voltage_alarm": 0}), PASS, "low voltage alarm 0"),
        (power_mode_check({"power_modes": [], "power_mode": None}), SKIPPED, "no nvpmodel"),
        (power_mode_check({"power_modes": ["15W", "MAXN"], "power_mode": "MAXN"}), PASS, "MAXN, of 15W, MAXN"),
        (power_mode_check({"power_modes": ["15W"], "power_mode": None}), FAIL, "cannot be read"),
        (power_mode_check({"power_modes": ["15W", "MAXN"], "power_mode": "MAXN"}, "MAXN"), PASS, "MAXN"),
        (power_mode_check({"power_modes": ["15W", "MAXN"], "power_mode": "15W"}, "MAXN"), FAIL, "measured in MAXN"),
        (trtexec_check("trtexec fp32", {}, 1.2), PASS, "1.200 of trtexec's"),
        (trtexec_check("trtexec fp32", {}, 0.7), FAIL, "25% apart allowed"),
        (trtexec_check("trtexec fp32", {"failed": "exit status 1"}, None), FAIL, "exit status 1"),
        (rails_check(info(board=None), state()), SKIPPED, "no power"),
        (rails_check(info(board=None), state(**{"power_w.gpu": 70.0})), PASS, "gpu 70.00 W"),
        (rails_check(info(), state(**{"power_w.VDD_IN": 4.5})), FAIL, "VDD_CPU_GPU_CV, VDD_SOC cannot be read"),
        (sensors_check(state(memory_used_mib=3.0)), SKIPPED, "3 MiB used"),
        (sensors_check(state(**{"temperature_c.cpu": 41.5, "clock_mhz.gpu": None})), PASS, "1 sensors"),
    ],
)  # fmt: skip
def test_a_state_is_judged_with_its_evidence(check, verdict, evidence):
    assert check.verdict is verdict
    assert evidence in check.evidence


def test_no_name_and_no_address_is_left_in_a_text():
    hide = Anonymizer({"orin-7": "HOST", "orin-7.lab.example": "HOST", "ada": "USER"}, ["10.3.0.26"])
    text = (
        "ada@orin-7.lab.example (192.168.1.20, fe80::1ff:fe23:4567:890a, 00:1b:44:11:3a:b7), TensorRT 10.3.0.26 at "
        "10:02:03 in /home/ada/work and '/root/jetway', GPU-5a1b2c3d-0000-1111-2222-333344445555; not adamant, 4.5.6"
    )
    assert hide.text(text) == (
        "USER@HOST (ADDRESS, ADDRESS, ADDRESS), TensorRT 10.3.0.26 at 10:02:03 in ~/work and '~/jetway', GPU-ID; "
        "not adamant, 4.5.6"
    )
    assert hide.value({"ada": ["orin-7", 3, None]}) == {"USER": ["HOST", 3, None]}


def test_a_work_folder_is_hidden_where_it_says_more_than_a_name():
    hide = anonymizer_for(Target(name="orin", host="10.0.0.7", work_dir="/data/ada/jetway"), info("10.0.0.6"))
    assert (
        hide.text("orin at 10.0.0.7: /data/ada/jetway/engines, orin-7")
        == "TARGET at HOST: WORK_DIR/engines, HOST"
    )
    assert hide.text("TensorRT 10.0.0.6 at 10.0.0.8") == "TensorRT 10.0.0.6 at ADDRESS"
    assert anonymizer_for(Target(name="orin"), None).text("jetway 0.1.0") == "jetway 0.1.0"


def test_the_report_is_a_table_and_the_same_as_json():
    found = info()
    checks = [precision_check("conv fp32 on orin-7", Precision.FP32, 0.0, ENGINE)]
    facts = {"target": target_facts(TENSORRT, found)}
    report = report_markdown(checks, facts, Anonymizer({"orin-7": "HOST"}, []))
    assert report.startswith("# jetway doctor: 1 PASS\n")
    assert "| conv fp32 on HOST | PASS | largest error 0" in report
    document = json.loads(report.partition("```json\n")[2].partition("\n```")[0])
    assert document["passed"] is True
    assert document["target"]["engines"]["tensorrt"]["version"] == "10.3.0"
    assert document["target"]["jetpack"] == "6.1, 6.2"
    assert "orin-7" not in report
    assert "1421022" not in report


@pytest.mark.parametrize("name", TINY_NETWORKS)
def test_a_tiny_network_is_a_workload_whose_outputs_are_its_own(name):
    workload = TinyWorkload(name)
    check_workload(workload)
    before = torch.random.get_rng_state()
    records = evaluate_network(workload, workload.network())
    assert workload.summarize(records)["error_ratio"] < 1e-6
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_worst_sample_counts():
    assert TinyWorkload("matmul").summarize([{"error_ratio": 0.1}, {"error_ratio": 0.3}]) == {
        "error_ratio": 0.3
    }


def test_an_error_is_a_share_of_the_largest_output():
    assert error_ratio(np.array([1.0, -4.0]), np.array([1.5, -4.0], np.float32)) == 0.125
    for wrong, words in (([1.0], "shape is"), ([1.0, float("nan")], "not finite")):
        with pytest.raises(ValueError, match=words):
            error_ratio(np.array([1.0, -4.0]), np.array(wrong))
