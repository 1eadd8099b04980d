import logging
from importlib.metadata import version

import pytest

from jetway.configs.schema import Recipe, Target
from jetway.tasks.errors import TargetMismatchError
from jetway.tasks.preflight import check_target, probe_target
from jetway.tasks.target_info import TargetInfo

TARGET = Target(name="board", python="/opt/python", work_dir="/data/jetway")


@pytest.fixture(scope="module")
def info(deployed):
    """What a real probe found."""
    return probe_target(deployed.session)


def recipe(**sections):
    return Recipe(name="r", workload={"class_path": "a:B"}, variants=["baseline-fp32"], **sections)


def changed(info, **changes):
    return TargetInfo.model_validate({**info.model_dump(), **changes})


def refusal(recipe, info, target=TARGET):
    with pytest.raises(TargetMismatchError) as caught:
        check_target(recipe, target, info)
    return str(caught.value)


def test_probe_gives_a_target_that_can_run_the_recipe(info):
    assert info.engines["onnxruntime"].version == version("onnxruntime")
    assert info.free_disk_mib > 0
    check_target(recipe(), TARGET.model_copy(update={"min_free_disk_mib": 1, "min_free_memory_mib": 1}), info)


def test_absent_engine_names_the_interpreter_and_the_reason(info):
    engines = {"onnxruntime": {"available": False, "reason": "No module named 'onnxruntime'."}}
    message = refusal(recipe(), changed(info, engines=engines))
    assert "/opt/python" in message
    assert "No module named 'onnxruntime'" in message


def test_opset_too_new_names_the_key_and_the_limit(info):
    engines = {"onnxruntime": {"available": True, "version": "1.10.0", "max_opset": 15}}
    message = refusal(recipe(export={"opset": 17}), changed(info, engines=engines))
    assert "export.opset=15" in message
    assert "1.10.0" in message


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("min_free_disk_mib", {"free_disk_mib": 100.0}),
        ("min_free_memory_mib", {"memory_mib": {"total": 512.0, "available": 100.0}}),
        ("python", {"python": "3.5.2"}),
        ("build.threads", {"cores": 1}),
    ],
)
def test_each_refusal_names_the_key_to_change(info, key, changes):
    assert key in refusal(recipe(build={"threads": 2}), changed(info, **changes))


def test_a_target_without_tensorrt_is_refused(info):
    target = Target(name="jetson", engine="tensorrt")
    assert "engine: tensorrt is not there" in refusal(recipe(), info, target)


def test_all_problems_come_in_one_message(info):
    message = refusal(recipe(build={"threads": 64}), changed(info, free_disk_mib=1.0, python="3.5.0"))
    assert message.count("\n  - ") == 3


def test_int8_without_instructions_for_it_is_a_warning(info, caplog):
    int8 = Recipe(name="r", workload={"class_path": "a:B"}, variants=["baseline-fp32", "baseline-int8-ptq"])
    cpu = info.cpu.model_dump() | {"int8_instruction_sets": []}
    target = TARGET.model_copy(update={"min_free_disk_mib": 1, "min_free_memory_mib": 1})
    with caplog.at_level(logging.WARNING, logger="jetway"):
        check_target(int8, target, changed(info, cpu=cpu))
    assert "int8" in caplog.text


def test_machine_names_the_cpu_and_its_int8_instructions(info):
    assert info.cpu.model in info.machine
    bare = info.cpu.model_dump() | {"int8_instruction_sets": []}
    assert "no int8 instructions" in changed(info, cpu=bare).machine
