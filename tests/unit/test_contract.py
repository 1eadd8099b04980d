"""The contract of boards, and what it refuses of a recipe, on probes as real boards would give them."""

import pytest

from jetway.configs.schema import Precision, Recipe, Target
from jetway.tasks.contract import BOARDS, JETPACKS, PARSER_LIMITS, contract_of, find_jetpack, version_of
from jetway.tasks.preflight import doubts
from jetway.tasks.requirements import (
    engine_problems,
    power_mode_problems,
    power_problems,
    profile_problems,
    trtexec_problems,
)
from jetway.tasks.target_info import TargetInfo

INT8 = (Precision.INT8_PTQ, Precision.INT8_QAT, Precision.INT8_CALIBRATED)
NANO = ("NVIDIA Jetson Nano Developer Kit", "R32 (release), REVISION: 7.1", "8.2.1.8", "5.3", 0)
XAVIER_NX = ("NVIDIA Jetson Xavier NX Developer Kit", "R35 (release), REVISION: 4.1", "8.5.2.2", "7.2", 2)
ORIN = ("NVIDIA Jetson AGX Orin Developer Kit", "R36 (release), REVISION: 4.3", "10.3.0", "8.7", 2)
ORIN_NANO = ("NVIDIA Jetson Orin Nano Developer Kit", "R36 (release), REVISION: 4.3", "10.3.0", "8.7", 0)
SERVER = (None, None, "11.1.0.106", "9.0", 0)


def info_of(board, l4t, tensorrt, capability, dla_cores, **changes):
    gpu = {"name": "a GPU", "compute_capability": capability, "multiprocessors": 4}
    engine = {"available": True, "version": tensorrt, "gpu": gpu, "dla_cores": dla_cores}
    values = {
        "schema_version": 1,
        "hostname": "board",
        "os": "Ubuntu",
        "kernel": "5",
        "python": "3.8.10",
        "board": board,
        "l4t": l4t,
        "boot_id": "b",
        "cpu": {
            "model": "Arm",
            "architecture": "aarch64",
            "instruction_sets": [],
            "int8_instruction_sets": [],
        },
        "cores": 4,
        "memory_mib": {"total": 8000.0, "available": 6000.0},
        "free_disk_mib": 9000.0,
        "frequencies_mhz": {},
        "accelerators": {},
        "engines": {
            "tensorrt": engine,
            "onnxruntime": {"available": True, "version": "1.20", "providers": ["CPUExecutionProvider"]},
        },
    }
    return TargetInfo.model_validate(values | changes)


def recipe(*variants, **sections):
    return Recipe(name="r", workload={"class_path": "a:B"}, variants=["baseline-fp32", *variants], **sections)


def problems(board, *variants, changes=None, target=None, **sections):
    target = Target(name="board", **(target or {"engine": "tensorrt"}))
    return list(engine_problems(recipe(*variants, **sections), target, info_of(*board, **(changes or {}))))


def test_every_fact_names_its_source():
    assert all(entry.source for entry in (*PARSER_LIMITS, *JETPACKS, *BOARDS))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("# R32 (release), REVISION: 6.1, GCID: 27863751, BOARD: t210ref, EABI: aarch64", "4.6"),
        ("# R32 (release), REVISION: 7.4, GCID: 33514132, BOARD: t210ref", "4.6.1 to 4.6.6"),
        ("# R35 (release), REVISION: 6.0, GCID: 1, BOARD: t186ref", "5.1"),
        ("# R36 (release), REVISION: 5.0, GCID: 1, BOARD: generic", "6.1, 6.2"),
        ("# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic", "7.2"),
    ],
)
def test_a_release_line_gives_its_jetpack(line, name):
    assert find_jetpack(line).name == name


@pytest.mark.parametrize("line", ["", "# R28 (release), REVISION: 2.1", "something else"])
def test_an_unknown_release_gives_none(line):
    assert find_jetpack(line) is None


def test_versions_compare_as_numbers():
    assert version_of("8.2.1.8") < version_of("8.10.0") < version_of("10.0.1")


@pytest.mark.parametrize(
    ("board", "name", "refused", "max_opset"),
    [
        (NANO, "Jetson Nano", {*INT8, Precision.BF16}, 13),
        (XAVIER_NX, "Jetson Xavier NX", {Precision.BF16}, 17),
        (ORIN, "Jetson AGX Orin", set(), 20),
        (ORIN_NANO, "Jetson Orin Nano", set(), 20),
        (SERVER, None, {Precision.INT8_CALIBRATED}, 25),
    ],
)
def test_contract_of_a_board(board, name, refused, max_opset):
    contract = contract_of(info_of(*board))
    assert (contract.board.name if contract.board else None) == name
    assert set(contract.refused) == {*refused, Precision.INT8_DYNAMIC}
    assert contract.parser.max_opset == max_opset
    assert contract.dla_cores == board[-1]


def test_what_the_probe_found_comes_before_the_table():
    orin_nx_8gb = ("NVIDIA Jetson Orin NX", None, "10.3.0", "8.7", 1)
    assert contract_of(info_of(*orin_nx_8gb)).dla_cores == 1


def test_a_board_without_a_working_gpu_is_told_by_its_name():
    engines = {"tensorrt": {"available": True, "version": "8.2.1.8"}}
    contract = contract_of(info_of(*NANO, engines=engines))
    assert (contract.compute_capability, contract.dla_cores) == ((5, 3), 0)
    assert Precision.INT8_PTQ in contract.refused


def test_a_precision_that_the_probe_does_not_list_is_refused():
    info = info_of(*ORIN)
    engine = info.engines["tensorrt"].model_copy(update={"precisions": ("fp32", "fp16", "int8")})
    changed = info.model_copy(update={"engines": {"tensorrt": engine}})
    assert set(contract_of(changed).refused) == {
        Precision.BF16,
        Precision.INT8_CALIBRATED,
        Precision.INT8_DYNAMIC,
    }


def test_a_recipe_that_fits_has_no_problems():
    assert problems(ORIN, "pruned-fp16", "pruned-bf16", "pruned-int8-qat", "pruned-int8-calibrated") == []
    assert problems(XAVIER_NX, "pruned-fp16", "pruned-int8-qat", tensorrt={"int8_rest": "fp16"}) == []
    assert problems(NANO, "pruned-fp16", export={"opset": 13}) == []
    assert problems(SERVER, "pruned-fp16", "pruned-int8-ptq") == []


ONE_SHAPE = {"min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [1, 3, 8, 8]}
DLA = {"dla": {"core": 0}}


@pytest.mark.parametrize(
    ("board", "variants", "sections", "fragments"),
    [
        (NANO, ["pruned-int8-qat"], {"export": {"opset": 13}}, ["variants: pruned-int8-qat", "5.3", "int8"]),
        (NANO, ["pruned-bf16"], {"export": {"opset": 13}}, ["variants: pruned-bf16", "bfloat16"]),
        (NANO, [], {}, ["export.opset=13", "8.2.1.8", "onnx-tensorrt"]),
        (XAVIER_NX, ["pruned-bf16"], {}, ["variants: pruned-bf16"]),
        (SERVER, ["pruned-int8-calibrated"], {}, ["variants: pruned-int8-calibrated", "no calibrator"]),
        (ORIN, ["pruned-int8-qat"], {"tensorrt": {"int8_rest": "fp16"}}, ["tensorrt.int8_rest", "opset=19"]),
        (ORIN_NANO, ["pruned-fp16"], {"tensorrt": DLA}, ["tensorrt.dla", "Orin Nano", "0 DLA cores"]),
        (SERVER, ["pruned-fp16"], {"tensorrt": DLA}, ["tensorrt.dla", "0 DLA cores"]),
        (ORIN, ["pruned-int8-qat"], {"tensorrt": DLA}, ["no Q/DQ", "pruned-int8-calibrated"]),
        (SERVER, ["pruned-int8-qat"], {"tensorrt": DLA}, ["tensorrt.dla", "0 DLA cores"]),
        (ORIN, [], {"tensorrt": DLA}, ["tensorrt.dla", "no variant"]),
        (
            XAVIER_NX,
            ["pruned-fp16"],
            {"tensorrt": {**DLA, "profiles": [{"image": {**ONE_SHAPE, "max": [4, 3, 8, 8]}}]}},
            ["tensorrt.dla", "one shape", "tensorrt.profiles"],
        ),
        (ORIN, [], {"export": {"dynamic_batch": True}}, ["tensorrt.profiles", "export.dynamic_batch=false"]),
        (XAVIER_NX, [], {"tensorrt": {"optimization_level": 5}}, ["tensorrt.optimization_level", "8.6"]),
        (XAVIER_NX, [], {"tensorrt": {"version_compatible": True}}, ["tensorrt.version_compatible", "8.6"]),
    ],
)
def test_a_refusal_names_the_key_to_change(board, variants, sections, fragments):
    (found,) = problems(board, *variants, **sections)
    for fragment in fragments:
        assert fragment in found


def test_dla_of_the_versions_without_one_is_refused():
    (found,) = problems(("AGX Orin", None, "10.13.3.9", "8.7", 2), "pruned-fp16", tensorrt=DLA)
    assert "0 DLA cores" in found


def test_a_tensorrt_of_the_past_is_refused():
    (found,) = problems(("Nano", None, "7.1.3", "5.3", 0))
    assert found.startswith("engine: TensorRT 7.1.3 is too old")


def test_too_little_memory_counts_swap():
    little = {"memory_mib": {"total": 4000.0, "available": 500.0, "swap_free": 0.0}}
    (found,) = problems(ORIN, changes=little)
    assert "tensorrt.workspace_mib" in found
    assert "swap" in found
    swap = {"memory_mib": {"total": 4000.0, "available": 500.0, "swap_free": 4000.0}}
    assert problems(ORIN, changes=swap) == []


def test_tactic_sources_are_those_of_the_probe():
    info = info_of(*ORIN)
    engine = info.engines["tensorrt"].model_copy(update={"tactic_sources": ("CUBLAS_LT",)})
    changed = info.model_copy(update={"engines": {"tensorrt": engine}})
    asked = recipe(tensorrt={"tactic_sources": ["CUBLAS_LT", "CUBLASS"]})
    (found,) = engine_problems(asked, Target(name="b", engine="tensorrt"), changed)
    assert "no CUBLASS" in found


@pytest.mark.parametrize(
    ("variant", "fragment"),
    [
        ("pruned-fp16", "computes fp16 in fp32"),
        ("pruned-bf16", "computes bf16 in fp32"),
        ("pruned-int8-calibrated", "calibrator"),
    ],
)
def test_onnxruntime_on_a_cpu_is_asked_for_what_it_computes(variant, fragment):
    (found,) = problems(ORIN, variant, target={"engine": "onnxruntime"})
    assert found.startswith(f"variants: {variant}")
    assert fragment in found


def test_a_provider_that_is_not_installed_is_named():
    found = problems(ORIN, "baseline-fp32-on-ort-cuda")
    assert len(found) == 1
    assert "no CUDAExecutionProvider, only CPUExecutionProvider" in found[0]


def test_int8_on_the_cuda_provider_is_refused():
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    engines = {
        "onnxruntime": {"available": True, "version": "1.20", "providers": providers},
        "tensorrt": info_of(*ORIN).engines["tensorrt"].model_dump(),
    }
    (found,) = problems(
        ORIN, "pruned-int8-qat-on-ort-cuda", "pruned-fp16-on-ort-cuda", changes={"engines": engines}
    )
    assert "pruned-int8-qat-on-ort-cuda" in found


def test_the_tensorrt_provider_can_do_no_more_than_tensorrt():
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    engines = {
        "onnxruntime": {"available": True, "version": "1.20", "providers": providers},
        "tensorrt": info_of(*NANO).engines["tensorrt"].model_dump(),
    }
    asked = ["pruned-int8-qat-on-ort-tensorrt", "pruned-fp16-on-ort-tensorrt"]
    (found,) = problems(NANO, *asked, changes={"engines": engines}, export={"opset": 13})
    assert "pruned-int8-qat-on-ort-tensorrt" in found


def test_variants_on_the_gpu_need_the_lease_of_the_gpu():
    found = problems(ORIN, "baseline-fp32-on-tensorrt", target={"engine": "onnxruntime"})
    assert any("lease" in text for text in found)


MODES = {"power_modes": ["MAXN", "15W", "30W"]}


@pytest.mark.parametrize(("keys", "sections"), [({"power_mode": "15W"}, {}), ({}, {"power_mode": "MAXN"})])
def test_a_power_mode_of_the_board_is_accepted(keys, sections):
    target = Target(name="orin", engine="tensorrt", **keys)
    assert list(power_mode_problems(recipe(benchmark=sections), target, info_of(*ORIN, **MODES))) == []


@pytest.mark.parametrize(
    ("keys", "sections", "key"),
    [
        ({"power_mode": "10W"}, {}, "power_mode: 10W"),
        ({"power_mode": "15W"}, {"power_mode": "MAXQ"}, "benchmark.power_mode: MAXQ"),
    ],
)
def test_a_power_mode_of_another_board_is_refused(keys, sections, key):
    target = Target(name="orin", engine="tensorrt", **keys)
    (found,) = power_mode_problems(recipe(benchmark=sections), target, info_of(*ORIN, **MODES))
    assert found.startswith(key)
    assert "MAXN, 15W, 30W" in found


def test_a_power_mode_that_this_user_may_not_set_is_refused_before_training():
    target = Target(name="orin", engine="tensorrt", lock_clocks=True)
    facts = MODES | {"power_problem": "jetson_clocks needs root, and sudo asks for a password here."}
    (found,) = power_mode_problems(recipe(), target, info_of(*ORIN, **facts))
    assert found == "power_mode, lock_clocks: jetson_clocks needs root, and sudo asks for a password here."


def test_a_power_mode_without_nvpmodel_is_refused():
    target = Target(name="server", engine="tensorrt", power_mode="MAXN")
    (found,) = power_mode_problems(recipe(), target, info_of(*SERVER))
    assert "nvpmodel lists none" in found


EXAMPLE = {"image": (2, 3, 8, 8), "offset": (2,)}
RANGE = {"min": [1, 3, 8, 8], "opt": [2, 3, 8, 8], "max": [8, 3, 8, 8]}
OFFSETS = {"min": [1], "opt": [2], "max": [8]}


def test_profiles_that_fit_the_workload_are_accepted():
    fitting = recipe(tensorrt={"profiles": [{"image": RANGE, "offset": OFFSETS}]})
    assert list(profile_problems(fitting, EXAMPLE)) == []


@pytest.mark.parametrize(
    ("profile", "fragments"),
    [
        ({"image": RANGE}, ["tensorrt.profiles.0: offset", "image, offset"]),
        ({"image": RANGE, "offset": OFFSETS, "mask": OFFSETS}, ["tensorrt.profiles.0: mask"]),
        ({"image": {**RANGE, "max": [8, 3, 9, 8]}, "offset": OFFSETS}, ["profiles.0.image", "[3, 8, 8]"]),
        ({"image": {**RANGE, "max": [8, 3, 8, 8], "min": [3, 3, 8, 8], "opt": [4, 3, 8, 8]}, "offset": OFFSETS},
         ["profiles.0.image", "batch of example_inputs, 2"]),
    ],
)  # fmt: skip
def test_profiles_that_do_not_fit_the_workload_are_named(profile, fragments):
    (found,) = profile_problems(recipe(tensorrt={"profiles": [profile]}), EXAMPLE)
    for fragment in fragments:
        assert fragment in found


@pytest.mark.parametrize(("board", "doubted"), [(ORIN, True), (SERVER, False)])
def test_bf16_in_an_opset_that_the_parser_is_not_known_to_take_is_doubted(board, doubted):
    target = Target(name="board", engine="tensorrt")
    assert bool(doubts(recipe("pruned-bf16"), target, info_of(*board))) is doubted
    assert doubts(recipe("pruned-fp16"), target, info_of(*board)) == []


def test_a_cross_check_needs_trtexec():
    asked = recipe(benchmark={"trtexec": True})
    (found,) = trtexec_problems(asked, info_of(*SERVER))
    assert "benchmark.trtexec=false" in found
    assert list(trtexec_problems(asked, info_of(*ORIN, trtexec="/usr/src/tensorrt/bin/trtexec"))) == []
    assert list(trtexec_problems(recipe(), info_of(*SERVER))) == []


def test_engines_may_differ_in_whether_they_take_queries_in_flight():
    beside = "baseline-fp32-on-ort-cpu"
    assert problems(ORIN, beside, benchmark={"scenarios": ["latency", "throughput"]}) == []


@pytest.mark.parametrize(
    ("power", "refused"),
    [
        ({"rails": ["VDD_IN"], "total": "VDD_IN"}, False),
        ({"rails": [], "total": "gpu"}, False),
        ({"rails": [], "total": None, "tegrastats": True}, False),
        ({"rails": [], "total": None, "tegrastats": False}, True),
    ],
)
def test_power_needs_something_that_measures_it(power, refused):
    info = info_of(*ORIN, power=power)
    found = list(power_problems(recipe(benchmark={"power": {}}), info))
    assert bool(found) is refused
    assert all(text.startswith("benchmark.power") for text in found)
    assert list(power_problems(recipe(), info)) == []
