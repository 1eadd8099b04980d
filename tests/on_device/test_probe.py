import json
import subprocess
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from jetway.tasks.on_device import machine, onnxruntime_engine, probe
from jetway.tasks.target.agent import build_agent

OLD_PYTHONS = sorted(Path.home().glob(".pyenv/versions/3.6.*/bin/python"))

# What runs for real in a Python that has neither numpy nor an engine.
IN_OLD_PYTHON = """
import json, sys
sys.path.insert(0, sys.argv[1])
from jetway.tasks.on_device import benchmark, build, errors, evaluate, latency, memory, passport
from jetway.tasks.on_device import probe, statistics, tensors
with tensors.TensorWriter("t.safetensors") as writer:
    writer.add_bytes("x", "I64", [2], b"\\0" * 16)
header = tensors.read_header("t.safetensors")[0]
try:
    build.run({"work_dir": ".", "onnx_sha256": "0", "threads": 1}, print)
except errors.DeviceError as exc:
    refused = exc.to_json()
print(json.dumps({
    "probe": probe.run({}, print), "header": header, "refused": refused,
    "median": statistics.median([1, 2]), "clock": latency.clock_ns() > 0,
}))
"""


def test_probe_tells_what_this_machine_is():
    facts = json.loads(json.dumps(probe.run({"work_dir": "/no/such/folder"}, print)))
    assert facts["engines"]["onnxruntime"]["version"] == onnxruntime.__version__
    assert "CPUExecutionProvider" in facts["engines"]["onnxruntime"]["providers"]
    assert 0 < facts["memory_mib"]["available"] <= facts["memory_mib"]["total"]
    assert facts["free_disk_mib"] > 0
    assert facts["cores"] >= 1
    assert facts["boot_id"]
    assert facts["accelerators"]["onnxruntime"] == "cpu"


def test_probe_names_the_instruction_sets_of_the_cpu():
    cpu = machine.cpu()
    flags = Path("/proc/cpuinfo").read_text().split()
    assert cpu["instruction_sets"]
    assert set(cpu["instruction_sets"]) <= set(flags)
    assert ("avx512_vnni" in cpu["int8_instruction_sets"]) == ("avx512_vnni" in flags)


def loads(opset):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options)
    except Exception:
        return False
    return True


def test_max_opset_is_the_newest_that_really_loads():
    newest = onnxruntime_engine.max_opset()
    assert loads(newest)
    assert not loads(newest + 1)


def test_the_handwritten_file_is_a_valid_model():
    model = onnx.load_from_string(onnxruntime_engine.one_node_onnx(17))
    onnx.checker.check_model(model)
    assert model.opset_import[0].version == 17


@pytest.mark.skipif(not OLD_PYTHONS, reason="no Python 3.6 here")
def test_python_3_6_without_an_engine(tmp_path):
    """The shared parts run, the probe says what is absent, and a build is refused as a mismatch."""
    agent = tmp_path / "agent.pyz"
    agent.write_bytes(build_agent())
    done = subprocess.run(
        [str(OLD_PYTHONS[0]), "-c", IN_OLD_PYTHON, str(agent)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["probe"]["python"].startswith("3.6.")
    assert not facts["probe"]["engines"]["onnxruntime"]["available"]
    assert "No module named" in facts["probe"]["engines"]["onnxruntime"]["reason"]
    assert facts["refused"]["kind"] == "mismatch"
    assert facts["header"]["x"]["shape"] == [2]
    assert facts["median"] == 1.5
    assert facts["clock"]
