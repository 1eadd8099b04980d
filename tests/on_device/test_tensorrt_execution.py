"""Sessions, scenarios and layer tables through the doubles of TensorRT, libcudart and trtexec, on each version's
surface. What runs is the worker's plumbing: nothing here says anything about TensorRT or a GPU.

One process a version, without numpy's help, does all that the tests look at.
"""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import doubles
import pytest
from doubles import networks

from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine import io_tensors
from jetway.tasks.target.agent import build_agent

OLDEST = sorted(Path.home().glob(".pyenv/versions/3.6.*/bin/python"))
FOLDED = {"min": [1, 1, 8, 8], "opt": [2, 1, 8, 8], "max": [4, 1, 8, 8]}
WIDE = {"min": [1, 1, 8, 8], "opt": [4, 1, 8, 8], "max": [8, 1, 8, 8]}

SCRIPT = """
import hashlib, json, os, sys
sys.path.insert(0, sys.argv[1])
files = json.loads(sys.argv[2])
from jetway.tasks.on_device import benchmark, build, errors, sessions, tensors, throughput
from jetway.tasks.on_device.tensors import Tensor

found = {}
library = None

def built(name, onnx, **options):
    with open(files[onnx], "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    request = {"onnx": files[onnx], "onnx_sha256": digest, "inputs": files["one"], "threads": 1, "revision": 1}
    options = dict({"workspace_mib": [64]}, **options)
    asked = dict(request, engine="tensorrt", options=options, work_dir=os.path.abspath("work"))
    result = build.run(asked, lambda line: None)
    return {"name": name, "path": result["engine"], "sha256": result["passport"]["engine_sha256"],
            "inputs": files["one"]}

def refused(call, *arguments):
    try:
        call(*arguments)
    except errors.DeviceError as exc:
        return exc.to_json()

def images(count):
    image = tensors.read_tensors(files["images"])["image"]
    return {"image": image.rows(0, count)}

def values(outputs):
    return [output.values() for output in outputs]

def handles(session):
    native = session.cuda._library
    return [native.cudartDoubleOpenHandles(), native.cudartDoubleUsedBytes()]

static = built("static", "fp32")
session = sessions.opened(sessions.checked(static))
one = session.inputs_of(images(1))
found["static"] = {
    "inputs": session.input_shapes, "outputs": session.output_names, "limits": session.batch_limits(),
    "dtypes": [output.dtype for output in session.run_checked(one)], "values": values(session.run_checked(one)),
    "memory": session.device_memory_bytes(),
}
found["missing"] = refused(session.inputs_of, {"picture": one["image"]})
found["shape"] = refused(session.run_checked, images(2))
found["type"] = refused(session.run_checked, {"image": Tensor("I32", (1, 1, 8, 8), bytes(256))})
double = Tensor("F64", (1, 1, 8, 8), one["image"].cast("F64").data)
found["cast"] = values(session.run_checked({"image": double}))
before = handles(session)
query = session.query(one)
for _ in range(20):
    query()
found["queried"] = values(session.lane.outputs())
found["grown"] = [after - start for after, start in zip(handles(session), before)]
session.close()
found["left"] = handles(session)

profiles = [{"image": files["folded"]}, {"image": files["wide"]}]
entry = sessions.checked(built("open", "open", profiles=profiles, cuda_graph=True))
session = sessions.opened(entry)
found["open"] = {"inputs": session.input_shapes, "limits": session.batch_limits()}
found["batches"] = {count: values(session.run_checked(images(count))) for count in (1, 3, 4, 6)}
found["profile"] = session.lane.profile
found["beyond"] = refused(session.run_checked, images(9))
lanes = session.lanes(2, images(2))
found["lane_profiles"] = [lane.profile for lane in lanes]
for lane in lanes:
    lane.query()()
found["lanes"] = [values(lane.outputs()) for lane in lanes]
found["graph_warnings"] = session.warnings
session.close()
found["open_left"] = handles(session)

found["zero_copy"] = refused(sessions.opened, dict(entry, load_options=dict(entry["load_options"], zero_copy=True)))
os.environ["CUDART_DOUBLE_FAIL"] = "cudaStreamBeginCapture:900"
session = sessions.opened(entry)
found["uncaptured"] = [values(session.run_checked(images(3))), session.warnings]
session.close()
del os.environ["CUDART_DOUBLE_FAIL"]

request = {"warmup_runs": 1, "min_queries": 5, "min_duration_s": 0.01, "slice_s": 0.002, "max_drift_ratio": 9,
           "max_extensions": 0, "max_duration_s": 10, "seed": 1, "keep_loaded": False,
           "work_dir": os.path.abspath("work"), "engines": [static, dict(entry, name="open")], "canary": static,
           "scenarios": ["latency", "throughput"], "profile_layers": True, "trtexec": files["trtexec"],
           "throughput": {"warmup_ms": 5.0, "min_duration_s": 0.05, "cuda_graph": True, "streams": 2}}
found["benchmark"] = benchmark.run(request, lambda line: None)
os.environ["TRTEXEC_DOUBLE_FAULT"] = "fail"
checked = sessions.checked(static)
found["failing"] = benchmark.measure_trtexec(files["trtexec"], checked, request, found["benchmark"])
found["no_trtexec"] = refused(benchmark.run, dict(request, trtexec="/no/such/trtexec"), lambda line: None)
os.environ["TENSORRT_DOUBLE_FAULT"] = "cannot_deserialize"
found["unloadable"] = refused(sessions.opened, entry)
os.environ["TENSORRT_DOUBLE_FAULT"] = "execute_fails"
session = sessions.opened(entry)
found["unenqueueable"] = refused(session.run_checked, images(1))
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("execution")
    with zipfile.ZipFile(io.BytesIO(build_agent())) as agent:
        agent.extractall(folder / "agent")  # where each Python keeps what it compiles
    trtexec = folder / "trtexec"
    script = doubles.FOLDER / "trtexec_double.py"
    trtexec.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    trtexec.chmod(0o755)
    return {
        **networks.write_networks(folder),
        "agent": str(folder / "agent"),
        "one": networks.write_images(folder / "one.safetensors", 1),
        "images": networks.write_images(folder / "images.safetensors", 9),
        "trtexec": str(trtexec),
        "folded": FOLDED,
        "wide": WIDE,
    }


@pytest.fixture(scope="session")
def run_of(files, tensorrt_double, tmp_path_factory):
    """What the process of a version found; one run each, however many tests look."""
    known = {}

    def run(version, python):
        if (version, python) not in known:
            command = [python, "-c", SCRIPT, files["agent"], json.dumps(files)]
            environment = os.environ | tensorrt_double(version)
            done = subprocess.run(
                command, cwd=tmp_path_factory.mktemp("job"), env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-3000:]
            known[version, python] = json.loads(done.stdout) | {"stderr": done.stderr}
        return known[version, python]

    return run


def pairs():
    for version in doubles.CUDA_OF_TENSORRT:
        marks = [] if version in doubles.THOROUGH else [pytest.mark.slow]
        yield pytest.param((version, sys.executable), id=version, marks=marks)
    for version, marks in {"8.0.1.6": [pytest.mark.slow], "8.2.1.8": []}.items():
        for python in OLDEST:
            yield pytest.param((version, str(python)), id=f"{version}-python3.6", marks=marks)


@pytest.fixture(params=pairs())
def found(request, run_of):
    """Every version in our Python, and the oldest two in the one that their JetPack has."""
    version, python = request.param
    # without onnxruntime the double gives a pattern, which is another for another batch
    return run_of(version, python) | {"version": version, "computes": python == sys.executable}


def major(found):
    return int(found["version"].split(".")[0])


def same_values(left, right):
    for mine, theirs in zip(left, right, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def rows(outputs, count):
    """Outputs of the first so many samples of a batch, each a flat list."""
    logits, labels = outputs
    return [logits[: 10 * count], labels[:count]]


def test_a_session_knows_its_tensors(found):
    static = found["static"]
    assert static["inputs"] == {"image": [1, 1, 8, 8]}
    assert static["outputs"] == ["logits", "label"]
    assert static["limits"] == [1, 1]
    assert static["dtypes"] == ["F32", "I64" if major(found) >= 10 else "I32"]
    assert static["memory"] > 0


def test_inputs_are_checked_before_anything_runs(found):
    assert "['image'] were not given" in found["missing"]["message"]
    assert "takes [1, 1, 8, 8]" in found["shape"]["message"]
    assert "cannot be given as F32" in found["type"]["message"]
    assert {found[name]["kind"] for name in ("missing", "shape", "type")} == {"bad_request"}


def test_doubles_are_given_as_floats(found):
    same_values(found["cast"], found["static"]["values"])


def test_queries_take_no_more_memory_and_everything_is_given_back(found):
    same_values(found["queried"], found["static"]["values"])
    assert found["grown"] == [0, 0]
    assert found["left"] == [0, 0]
    assert found["open_left"] == [0, 0]


def test_any_batch_that_a_profile_takes_gives_the_same(found):
    """Sizes that grow and shrink, the last beyond the first profile."""
    assert found["open"] == {"inputs": {"image": [-1, 1, 8, 8]}, "limits": [1, 2]}
    for count, outputs in found["batches"].items():
        assert len(outputs[0]) == 10 * int(count)
        if found["computes"]:
            same_values(rows(outputs, 1), found["static"]["values"])
    assert found["profile"] == 1
    assert "tensorrt.profiles" in found["beyond"]["message"]


def test_lanes_run_the_same_work_and_share_no_profile_that_cannot_be_shared(found):
    assert found["lane_profiles"] == [0, 1]
    first, second = found["lanes"]
    same_values(first, second)
    if found["computes"]:
        same_values(first, rows(found["batches"]["3"], 2))


def test_a_graph_that_cannot_be_captured_is_told_and_done_without(found):
    assert found["graph_warnings"] == []
    outputs, warnings = found["uncaptured"]
    same_values(outputs, found["batches"]["3"])
    assert len(warnings) == 1
    assert "cudaErrorStreamCaptureUnsupported" in warnings[0]
    assert warnings[0] in found["stderr"]


@pytest.mark.parametrize(
    ("dtype", "location", "words"),
    [("INT4", "DEVICE", "'odd' is INT4"), ("INT32", "HOST", "'odd' are a shape")],
)
def test_tensors_that_cannot_be_handed_over_are_refused_by_name(dtype, location, words):
    with pytest.raises(DeviceError, match=words) as caught:
        io_tensors.IoTensor("odd", True, SimpleNamespace(name=dtype), (2,), SimpleNamespace(name=location))
    assert caught.value.kind == "mismatch"


def test_zero_copy_is_for_integrated_gpus(found):
    assert "tensorrt.zero_copy" in found["zero_copy"]["message"]


def test_what_tensorrt_refuses_says_why(found):
    assert found["unloadable"]["kind"] == "mismatch"
    assert "TensorRT says" in found["unloadable"]["message"]
    assert "image': 'F32[1, 1, 8, 8]" in found["unenqueueable"]["message"]
    assert "could not enqueue" in found["unenqueueable"]["message"]


def test_the_scenario_throughput_reports_as_trtexec_does(found):
    for report in found["benchmark"]["throughput"].values():
        assert report["queries"] >= 10
        assert report["queries_per_s"] > 0
        assert report["settings"]["streams"] == 2
        assert report["settings"]["cuda_graph"] is True
        for name in ("latency_ms", "enqueue_python_ms", "h2d_ms", "gpu_compute_ms", "d2h_ms"):
            statistics = report[name]
            assert 0 <= statistics["min"] <= statistics["median"] <= statistics["p99"] <= statistics["max"]


def test_memory_on_the_device_is_counted(found):
    """What the double allocates: buffers, and nothing for weights or activations."""
    for peak in found["benchmark"]["memory"].values():
        assert peak["peak"] > 5
        assert 0 <= peak["device"] < 1
        assert peak["device_free"] > 8000


def test_layers_come_with_their_times(found):
    for table in found["benchmark"]["layers"].values():
        assert sum(row["share_ratio"] for row in table) == pytest.approx(1)
        assert all(row["time_ms"] > 0 for row in table)
        assert any("Conv" in row["name"] for row in table)
        told = {row["precision"] for row in table if row["precision"]}
        assert told <= {"fp32", "int32", "int64", "mixed"}
        assert bool(told) == (found["version"] != "8.0.1.6")


def test_trtexec_measures_the_same_on_every_version(found):
    """Whatever its defaults are: with the modes of our own measurement, and both engines' shapes."""
    static, opened = (found["benchmark"]["trtexec"][name] for name in ("static", "open"))
    assert static["passed"]
    assert opened["passed"]
    assert found["version"].startswith(static["version"])
    assert static["h2d_ms"]["median"] > 0
    assert {"p90", "p95", "p99", "median", "mean"} <= set(static["gpu_compute_ms"])
    assert set(static["differences"]) == {"gpu_compute_ms", "latency_ms", "h2d_ms", "d2h_ms", "queries_per_s"}
    assert not any("--shapes" in flag for flag in static["command"])
    assert "--shapes=image:1x1x8x8" in opened["command"]


def test_a_trtexec_that_fails_costs_no_measurement(found):
    assert "exit status 1" in found["failing"]["failed"]
    assert "asks for this fault" in found["failing"]["failed"]


def test_a_missing_trtexec_is_told_before_anything_runs(found):
    assert found["no_trtexec"]["kind"] == "mismatch"
    assert "benchmark.trtexec" in found["no_trtexec"]["message"]


def test_nothing_of_ours_is_misused(found):
    """The doubles tell of misuse on stderr; what else is there is TensorRT's log, and the one warning."""
    lines = [line for line in found["stderr"].splitlines() if not re.match(r"\[TensorRT \w+\] ", line)]
    assert set(lines) == set(found["uncaptured"][1])
