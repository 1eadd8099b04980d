"""Builds through the double of TensorRT: the worker's plumbing on each version's surface, and nothing about TensorRT.

Where a test is about what a build asks of TensorRT it runs in one process a version; where it is about processes,
such as the ladder, it runs as on a target.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import doubles
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from jetway.tasks.on_device import tensors
from jetway.tasks.target.agent import build_agent

VERSIONS = list(doubles.CUDA_OF_TENSORRT)
WEAK = [version for version in VERSIONS if version.startswith("8.")]
BOTH = [version for version in VERSIONS if version.startswith("10.")]
STRONG = [version for version in VERSIONS if version.startswith("11.")]
KINDS = ("min", "opt", "max")
OWN_PYTHON = [pytest.param(version, sys.executable, id=version) for version in VERSIONS]
OTHER_PYTHONS = [
    pytest.param(version, str(path), id=f"{version}-{path.parts[-3]}", marks=pytest.mark.slow)
    for minor in ("3.6", "3.8", "3.10", "3.12")
    for path in sorted(Path.home().glob(f".pyenv/versions/{minor}.*/bin/python"))[-1:]
    for version in VERSIONS
]

# Reads requests, one JSON object a line, and answers each with one.
SERVER = """
import importlib, json, os, sys
from jetway.tasks.on_device import errors
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    spec, progress = json.loads(line), []
    os.environ.update(spec["environment"])
    try:
        arguments = [progress.append if argument == "PROGRESS" else argument for argument in spec["arguments"]]
        function = getattr(importlib.import_module("jetway.tasks.on_device." + spec["module"]), spec["function"])
        answer = {"result": function(*arguments)}
    except errors.DeviceError as exc:
        answer = {"error": exc.to_json()}
    except Exception as exc:
        answer = {"crash": "{}: {}".format(type(exc).__name__, exc)}
    for name in spec["environment"]:
        del os.environ[name]
    out.write(json.dumps(dict(answer, progress=progress)) + "\\n")
    out.flush()
"""


class Refused(Exception):
    """A DeviceError of the other process."""

    def __init__(self, error):
        super().__init__(error["message"])
        self.kind, self.cause = error["kind"], error["cause"]


class Device:
    """A Python with the agent and the doubles, which runs functions of the agent in a folder of its own."""

    def __init__(self, python, agent, folder, variables):
        self.folder = folder
        path = os.pathsep.join([str(agent), variables["PYTHONPATH"]])
        self._python = str(python)
        self._environment = os.environ | variables | {"PYTHONPATH": path}
        self._process = self.spawn(SERVER, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.progress = []

    def spawn(self, code, *arguments, **pipes):
        with open(self.folder / "stderr", "ab") as log:
            return subprocess.Popen(
                [self._python, "-c", code, *arguments],
                cwd=self.folder, env=self._environment, stderr=log, text=True, **pipes,
            )  # fmt: skip

    def call(self, module, function, *arguments, **environment):
        """``"PROGRESS"`` among the arguments stands for a function that collects ``progress``."""
        spec = {"module": module, "function": function, "arguments": arguments}
        self._process.stdin.write(json.dumps(spec | {"environment": environment}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, (self.folder / "stderr").read_text()[-2000:]
        answer = json.loads(answer)
        self.progress = answer["progress"]
        if "error" in answer:
            raise Refused(answer["error"])
        assert "result" in answer, answer
        return answer["result"]

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="session")
def agent(tmp_path_factory):
    path = tmp_path_factory.mktemp("agent") / "agent.pyz"
    path.write_bytes(build_agent())
    return path


@pytest.fixture(scope="session")
def device(agent, tensorrt_double, tmp_path_factory):
    """``device("8.2.1.8")``: one process a version, kept for all tests. It has two DLA cores where DLA exists."""
    started = {}

    def find(version, python=sys.executable):
        key = (version, str(python))
        if key not in started:
            variables = tensorrt_double(version, TENSORRT_DOUBLE_DLA_CORES=2)
            started[key] = Device(python, agent, tmp_path_factory.mktemp("device"), variables)
        return started[key]

    yield find
    for one in started.values():
        one.close()


class Networks:
    """ONNX files of one small convolutional network, each carrying another precision."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, name, nodes, weights, shape=(1, 3, 8, 8), opset=17, **options):
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            nodes, name,
            [value("image", TensorProto.FLOAT, shape)], [value("scores", TensorProto.FLOAT, None)], weights,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        path = self.folder / f"{name}.onnx"
        onnx.save(onnx.shape_inference.infer_shapes(model), path, **options)
        return str(path)

    def plain(self, name="plain", shape=(1, 3, 8, 8), **options):
        nodes = [
            helper.make_node("Conv", ["image", "w"], ["features"], name="stem/conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["features"], ["active"], name="stem/relu"),
            helper.make_node("GlobalAveragePool", ["active"], ["pooled"], name="head/pool"),
            helper.make_node("Softmax", ["pooled"], ["scores"], name="head/softmax", axis=1),
        ]
        return self.save(name, nodes, [weight("w", np.float32)], shape, **options)

    def half(self, dtype=TensorProto.FLOAT16, shape=(1, 3, 8, 8)):
        values = weight("w", np.float32)
        typed = helper.make_tensor("w", dtype, values.dims, numpy_helper.to_array(values).ravel())
        nodes = [
            helper.make_node("Cast", ["image"], ["low"], name="to_low", to=dtype),
            helper.make_node("Conv", ["low", "w"], ["features"], name="stem/conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["features"], ["active"], name="stem/relu"),
            helper.make_node("Cast", ["active"], ["scores"], name="to_float", to=TensorProto.FLOAT),
        ]
        return self.save(f"low{dtype}{shape[0]}", nodes, [typed], shape)

    def quantized(self):
        scale = numpy_helper.from_array(np.float32(0.1), "s")
        zero = numpy_helper.from_array(np.int8(0), "z")
        nodes = [
            helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"], name="q"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"], name="dq"),
            helper.make_node("Conv", ["dq", "w"], ["features"], name="stem/conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["features"], ["scores"], name="stem/relu"),
        ]
        return self.save("quantized", nodes, [weight("w", np.float32), scale, zero])


def weight(name, dtype):
    return numpy_helper.from_array(np.ones((4, 3, 3, 3), dtype), name)


@pytest.fixture(scope="session")
def nets(tmp_path_factory):
    return Networks(tmp_path_factory.mktemp("nets"))


@pytest.fixture
def images(tmp_path):
    def save(batch=1, name="images", size=8):
        path = str(tmp_path / f"{name}.safetensors")
        header = {
            "dtype": "F32",
            "shape": [batch, 3, size, size],
            "data_offsets": [0, batch * 3 * size * size * 4],
        }
        values = np.random.default_rng(batch).standard_normal((batch, 3, size, size), dtype=np.float32)
        text = json.dumps({"image": header}).encode()
        Path(path).write_bytes(len(text).to_bytes(8, "little") + text + values.tobytes())
        assert tensors.read_header(path)[0]["image"]["shape"] == [batch, 3, size, size]
        return path

    return save


@pytest.fixture
def build(device, nets, images, tmp_path):
    """Builds in the version's one process: ``build("8.2.1.8", onnx, precision="fp16")``."""

    def run(version, onnx_path, *, workspace_mib=256, environment=None, inputs=None, **asked):
        there = device(version)
        request = {
            "onnx": onnx_path, "inputs": inputs or images(), "work_dir": str(tmp_path / "work"),
            "engine_path": str(tmp_path / "out.engine"), "workspace_mib": workspace_mib,
            "platform": {"engine_version": version},
            "options": there.call("tensorrt_engine.options", "normalised", {"options": asked}),
        }  # fmt: skip
        return there.call("tensorrt_engine.builder", "build", request, "PROGRESS", **(environment or {}))

    return run


def job_request(onnx_path, inputs, work_dir, **asked):
    return {
        "engine": "tensorrt", "onnx": onnx_path, "onnx_sha256": "0" * 64, "inputs": inputs, "threads": 1,
        "revision": 1, "work_dir": str(work_dir), "options": asked,
    }  # fmt: skip


# The verb, from request to passport


@pytest.mark.parametrize(("version", "python"), [*OWN_PYTHON, *OTHER_PYTHONS])
def test_the_verb_builds_runs_and_describes(device, nets, images, tmp_path, version, python):
    there = device(version, python)
    request = job_request(nets.half(), images(), tmp_path / "work", precision="fp16")
    built = there.call("build", "run", request, "PROGRESS")
    passport = built["passport"]
    assert passport["platform"]["engine"] == "tensorrt"
    assert passport["platform"]["engine_version"] == version
    assert passport["platform"]["gpu"]["compute_capability"] == "8.7"
    assert passport["platform"]["double"] is True
    assert passport["simulated"] is True
    assert passport["options"]["precision"] == "fp16"
    assert passport["flags"] == (["FP16"] if version in WEAK else [])
    assert passport["workspace_mib"] == 4096
    assert [rung["outcome"] for rung in passport["ladder"]] == ["built"]
    assert Path(built["engine"]).read_bytes().startswith(b"TENSORRT DOUBLE")
    assert there.call("build", "run", request, "PROGRESS") == {**built, "reused": True}


def test_an_engine_of_another_version_is_refused(device, nets, images, tmp_path):
    request = job_request(nets.plain(), images(), tmp_path / "work")
    built = device("10.3.0").call("build", "run", request, "PROGRESS")
    digest = built["passport"]["engine_sha256"]
    device("10.3.0").call("passport", "check", built["engine"], digest)
    with pytest.raises(Refused, match=r"engine_version is 10.7.0 here and was 10.3.0 there") as caught:
        device("10.7.0").call("passport", "check", built["engine"], digest)
    assert caught.value.kind == "mismatch"


def test_an_engine_of_another_gpu_is_refused(agent, tensorrt_double, nets, images, tmp_path):
    request = job_request(nets.plain(), images(), tmp_path / "work")
    devices = []
    for capability in ("8.7", "7.2"):
        variables = tensorrt_double("8.5.2.2", CUDART_DOUBLE_COMPUTE_CAPABILITY=capability)
        (tmp_path / capability).mkdir()
        devices.append(Device(sys.executable, agent, tmp_path / capability, variables))
    try:
        built = devices[0].call("build", "run", request, "PROGRESS")
        with pytest.raises(Refused, match=r"gpu is .*7\.2.* here and was .*8\.7.* there"):
            devices[1].call("passport", "check", built["engine"], built["passport"]["engine_sha256"])
    finally:
        for one in devices:
            one.close()


def test_other_options_give_another_engine(device, nets, images, tmp_path):
    there, inputs, work = device("8.6.1.6"), images(), tmp_path / "work"
    plain = there.call("build", "run", job_request(nets.plain(), inputs, work), "PROGRESS")
    tf32 = there.call("build", "run", job_request(nets.plain(), inputs, work, tf32=True), "PROGRESS")
    assert tf32["engine"] != plain["engine"]


def test_changed_weights_in_a_file_of_their_own_are_built_anew(device, images, tmp_path):
    path = Networks(tmp_path).plain(save_as_external_data=True, location="weights", size_threshold=0)
    there, request = device("10.3.0"), job_request(path, images(), tmp_path / "work")
    first = there.call("build", "run", request, "PROGRESS")
    weights = tmp_path / "weights"
    assert first["passport"]["external_data"] == {"weights": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert there.call("build", "run", request, "PROGRESS")["reused"]
    weights.write_bytes(bytes(weights.stat().st_size))
    second = there.call("build", "run", request, "PROGRESS")
    assert not second["reused"]
    assert second["engine"] != first["engine"]


@pytest.mark.parametrize("version", ["8.2.1.8", "10.3.0"])
def test_how_an_engine_is_loaded_asks_for_no_other_build(device, nets, images, tmp_path, version):
    there, inputs, work = device(version), images(), tmp_path / "work"
    plain = there.call("build", "run", job_request(nets.plain(), inputs, work), "PROGRESS")
    asked = job_request(nets.plain(), inputs, work, cuda_graph=True, streams=2)
    # A build would run into it.
    graph = there.call("build", "run", asked, "PROGRESS", TENSORRT_DOUBLE_FAULT="out_of_memory_above:1")
    assert graph["reused"]
    assert graph["passport"]["load_options"]["cuda_graph"]
    for key in ("engine_sha256", "options", "ladder", "built_at", "build_s"):
        assert graph["passport"][key] == plain["passport"][key]
    again = there.call("build", "run", job_request(nets.plain(), inputs, work), "PROGRESS")
    assert again == {**plain, "reused": True}


def test_a_way_of_loading_that_does_not_work_here_is_refused_for_a_copy_too(device, nets, images, tmp_path):
    there, inputs, work = device("10.3.0"), images(), tmp_path / "work"
    there.call("build", "run", job_request(nets.plain(), inputs, work), "PROGRESS")
    shared = job_request(nets.plain(), inputs, work, zero_copy=True)
    with pytest.raises(Refused, match="zero_copy"):
        there.call("build", "run", shared, "PROGRESS", CUDART_DOUBLE_INTEGRATED="0")
    assert len(list((work / "engines").glob("*.engine"))) == 1


def test_an_engine_that_cannot_be_loaded_is_not_kept(device, nets, images, tmp_path):
    request = job_request(nets.plain(), images(), tmp_path / "work")
    with pytest.raises(Refused, match="cannot load"):
        device("8.6.1.6").call(
            "build", "run", request, "PROGRESS", TENSORRT_DOUBLE_FAULT="cannot_deserialize"
        )
    assert not list((tmp_path / "work" / "engines").iterdir())


@pytest.mark.parametrize("version", VERSIONS)
def test_probe_tells_what_the_version_has(device, version):
    facts = device(version).call("tensorrt_engine.engine", "facts")
    assert facts["available"]
    assert facts["double"]
    assert ("bf16" in facts["precisions"]) is (version not in WEAK)
    assert ("int8-calibrated" in facts["precisions"]) is (version not in STRONG)
    assert facts["strongly_typed"] is (version not in WEAK)
    assert facts["weakly_typed"] is (version not in STRONG)
    assert facts["dla_cores"] == (
        0 if version in ("10.13.3.9", "10.16.1.11", "11.0.0.114", "11.1.0.106") else 2
    )
    assert facts["gpu"]["compute_capability"] == "8.7"


# Precision


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("precision", "network", "weak_flags"),
    [("fp32", "plain", []), ("fp16", "half", ["FP16"]), ("int8", "quantized", ["INT8"])],
)
def test_a_file_that_carries_its_precision_builds_everywhere(
    build, nets, version, precision, network, weak_flags
):
    facts = build(version, getattr(nets, network)(), precision=precision)
    assert facts["flags"] == (weak_flags if version in WEAK else [])
    assert facts["strongly_typed"] is (version not in WEAK)


@pytest.mark.parametrize("version", VERSIONS)
def test_tf32_is_on_only_when_asked_for(build, nets, version):
    assert "TF32" not in build(version, nets.plain())["flags"]
    assert "TF32" in build(version, nets.plain(), tf32=True)["flags"]


@pytest.mark.parametrize("version", BOTH + STRONG)
def test_bf16_comes_with_the_file(build, nets, version):
    assert build(version, nets.half(TensorProto.BFLOAT16), precision="bf16")["flags"] == []


@pytest.mark.parametrize("version", WEAK)
def test_bf16_is_refused_where_there_is_none(build, nets, version):
    with pytest.raises(Refused, match=rf"variants: TensorRT {version} .*no BF16 flag") as caught:
        build(version, nets.plain(), precision="bf16")
    assert caught.value.kind == "mismatch"


@pytest.mark.parametrize("version", WEAK + BOTH)
def test_fp16_of_a_float_file_is_a_flag(build, nets, version):
    facts = build(version, nets.plain(), precision="fp16")
    assert facts["flags"] == ["FP16"]
    assert not facts["strongly_typed"]


@pytest.mark.parametrize("version", STRONG)
def test_fp16_of_a_float_file_is_refused_where_the_file_decides(build, nets, version):
    with pytest.raises(Refused, match="convert it on the host"):
        build(version, nets.plain(), precision="fp16")


@pytest.mark.parametrize("version", WEAK)
def test_the_rest_of_an_int8_network_may_be_fp16(build, nets, version):
    assert build(version, nets.quantized(), precision="int8", int8_rest="fp16")["flags"] == ["FP16", "INT8"]


def test_int8_without_ranges_is_refused(build, nets):
    with pytest.raises(Refused, match="has none: use int8-calibrated"):
        build("8.5.2.2", nets.plain(), precision="int8")


@pytest.mark.parametrize("version", WEAK)
def test_layers_are_kept_higher_by_glob(build, nets, version):
    facts = build(version, nets.plain(), precision="fp16", mixed={"head/*": "fp32", "nowhere": "fp32"})
    assert facts["mixed"] == {"head/*": ["head/pool", "head/softmax"], "nowhere": []}
    insist = "STRICT_TYPES" if version.startswith("8.0") else "OBEY_PRECISION_CONSTRAINTS"
    assert facts["flags"] == ["FP16", insist]


def test_precisions_that_the_gpu_is_slow_at_are_told(build, nets):
    nano = {"CUDART_DOUBLE_COMPUTE_CAPABILITY": "5.3"}
    assert build("8.2.1.8", nets.half(), precision="fp16", environment=nano)["slow_precisions"] == []
    assert build("8.2.1.8", nets.quantized(), precision="int8", environment=nano)["slow_precisions"] == [
        "INT8"
    ]


# Calibration


def calibration(images, algorithm="entropy", count=3, cache=None):
    batches = [images(name=f"batch{number}") for number in range(count)]
    return {"algorithm": algorithm, "batches": batches, "cache": cache}


@pytest.mark.parametrize("version", WEAK + BOTH)
@pytest.mark.parametrize("algorithm", ["entropy", "minmax"])
def test_int8_by_calibration(build, nets, images, version, algorithm):
    facts = build(
        version, nets.plain(), precision="int8-calibrated", calibration=calibration(images, algorithm)
    )
    assert facts["flags"] == ["INT8"]
    assert facts["calibration"]["batches"] == 3
    text = Path(facts["calibration"]["cache"]["path"]).read_bytes()
    assert text.startswith(b"TRT-")


@pytest.mark.parametrize("version", WEAK + BOTH)
def test_a_cache_of_this_version_needs_no_batches(build, nets, images, version):
    first = build(version, nets.plain(), precision="int8-calibrated", calibration=calibration(images))
    cache = first["calibration"]["cache"]["path"]
    asked = {"algorithm": "entropy", "batches": [], "cache": cache}
    again = build(version, nets.plain(), precision="int8-calibrated", calibration=asked)
    assert again["calibration"]["batches"] == 0
    assert again["calibration"]["cache_used"]


def test_a_cache_of_another_version_is_not_used(build, nets, images, tmp_path):
    stale = tmp_path / "stale"
    stale.write_bytes(b"TRT-8201-EntropyCalibration2\nimage: 3c010a14\n")
    asked = calibration(images, cache=str(stale))
    facts = build("8.5.2.2", nets.plain(), precision="int8-calibrated", calibration=asked)
    assert facts["calibration"]["batches"] == 3
    asked = {"algorithm": "entropy", "batches": [], "cache": str(stale)}
    with pytest.raises(Refused, match=r"tensorrt\.calibration: the cache begins with"):
        build("8.5.2.2", nets.plain(), precision="int8-calibrated", calibration=asked)


def test_batches_of_another_shape_are_refused(build, nets, images):
    """TensorRT would read beyond their end."""
    asked = {"algorithm": "entropy", "batches": [images(), images(name="small", size=4)], "cache": None}
    with pytest.raises(Refused, match=r"the shape \[1, 3, 4, 4\], and the build is tuned for \[1, 3, 8, 8\]"):
        build("8.5.2.2", nets.plain(), precision="int8-calibrated", calibration=asked)
    network, shapes = nets.plain("open", (1, 3, "height", 8)), {kind: [1, 3, 16, 8] for kind in KINDS}
    with pytest.raises(Refused, match=r"tuned for \[1, 3, 16, 8\]"):
        build(
            "8.5.2.2", network, precision="int8-calibrated", calibration=calibration(images),
            profiles=[{"image": shapes}],
        )  # fmt: skip


def test_a_batch_without_an_input_is_refused(build, nets, images, tmp_path):
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(Path(images()).read_bytes().replace(b"image", b"imago"))
    asked = {"algorithm": "minmax", "batches": [str(odd)], "cache": None}
    with pytest.raises(Refused, match=r"lacks the inputs \['image'\]; it has \['imago'\]"):
        build("8.5.2.2", nets.plain(), precision="int8-calibrated", calibration=asked)


@pytest.mark.parametrize("version", STRONG)
def test_calibration_is_refused_where_it_is_gone(build, nets, images, version):
    with pytest.raises(Refused, match="no int8 calibration") as caught:
        build(version, nets.plain(), precision="int8-calibrated", calibration=calibration(images))
    assert caught.value.kind == "mismatch"


# Shapes


@pytest.mark.parametrize("version", VERSIONS)
def test_a_profile_is_built_for_open_dimensions(build, nets, images, version):
    shapes = {"min": [1, 3, 8, 8], "opt": [2, 3, 8, 8], "max": [4, 3, 8, 8]}
    network = nets.plain("dynamic", ("batch", 3, 8, 8))
    assert build(version, network, profiles=[{"image": shapes}])["profiles"] == [{"image": shapes}]
    example = build(version, network, inputs=images(2))["profiles"]
    assert example == [{"image": {key: [2, 3, 8, 8] for key in KINDS}}]


@pytest.mark.parametrize("version", ["8.2.1.8", "10.3.0"])
def test_calibration_of_an_open_batch_has_a_profile(build, nets, images, version):
    shapes = {key: [1, 3, 8, 8] for key in KINDS}
    network = nets.plain("dynamic", ("batch", 3, 8, 8))
    asked = {"precision": "int8-calibrated", "profiles": [{"image": shapes}]}
    assert build(version, network, calibration=calibration(images), **asked)["calibration"]["batches"] == 3


# What only some versions have


SINCE_8_6 = [version for version in VERSIONS if version.startswith("8.") and version < "8.6"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("option", "value"),
    [("optimization_level", 5), ("max_aux_streams", 0), ("hardware_compatibility", "ampere_plus"),
     ("version_compatible", True)],
)  # fmt: skip
def test_options_that_came_with_8_6(build, nets, version, option, value):
    if version in SINCE_8_6:
        with pytest.raises(Refused, match=f"^tensorrt.{option}: TensorRT {version} on this target") as caught:
            build(version, nets.plain(), **{option: value})
        assert caught.value.kind == "mismatch"
    else:
        assert build(version, nets.plain(), **{option: value})["layers"] == 4


@pytest.mark.parametrize("version", ["10.7.0", "10.13.3.9"])
def test_same_compute_capability_came_with_10_13(build, nets, version):
    asked = {"hardware_compatibility": "same_compute_capability"}
    if version == "10.7.0":
        with pytest.raises(Refused, match="hardware compatibility same_compute_capability"):
            build(version, nets.plain(), **asked)
    else:
        build(version, nets.plain(), **asked)


@pytest.mark.parametrize("version", VERSIONS)
def test_tactic_sources_by_name(build, nets, version):
    if version in STRONG:
        with pytest.raises(Refused, match=r"no tactic source CUBLAS_LT. It has: EDGE_MASK_CONVOLUTIONS"):
            build(version, nets.plain(), tactic_sources=["CUBLAS_LT"])
    else:
        build(version, nets.plain(), tactic_sources=["CUBLAS_LT", "CUDNN"])


@pytest.mark.parametrize("name", ["cublas", "__members__", "name"])
def test_what_is_no_tactic_source_is_refused(build, nets, name):
    with pytest.raises(Refused, match="no tactic source"):
        build("8.5.2.2", nets.plain(), tactic_sources=[name])


@pytest.mark.parametrize("version", VERSIONS)
def test_progress_is_told_in_steps_where_the_version_can(build, device, nets, version):
    build(version, nets.plain())
    texts = [line["text"] for line in device(version).progress]
    assert texts[:2] == ["parsing the network", "building 4 layers"]
    assert ("Building the double's engine" in texts) is (version not in WEAK)
    shares = [line["done"] for line in device(version).progress]
    assert shares == sorted(shares)


# The timing cache


@pytest.mark.parametrize("version", VERSIONS)
def test_timings_are_kept_and_used_again(build, nets, tmp_path, version):
    first, second = build(version, nets.plain()), build(version, nets.plain())
    assert not first["timing_cache"]["hit"]
    assert second["timing_cache"]["hit"]
    assert [path.name for path in (tmp_path / "work/timing_caches").glob("*.timing")] == [
        second["timing_cache"]["file"]
    ]


def test_a_damaged_timing_cache_is_ignored_and_made_anew(build, nets, tmp_path):
    name = build("10.3.0", nets.plain())["timing_cache"]["file"]
    path = tmp_path / "work/timing_caches" / name
    path.write_bytes(b"not at all")
    facts = build("10.3.0", nets.plain())["timing_cache"]
    assert (facts["hit"], facts["ignored"]) == (False, True)
    assert build("10.3.0", nets.plain())["timing_cache"]["hit"]


def test_a_timing_cache_of_another_device_is_ignored_and_said(build, nets):
    build("10.3.0", nets.plain())
    facts = build("10.3.0", nets.plain(), environment={"CUDART_DOUBLE_COMPUTE_CAPABILITY": "9.0"})
    assert facts["timing_cache"]["ignored"]
    assert any("another device" in text for text in facts["warnings"])


def test_builds_side_by_side_keep_each_others_timings(device, nets, images, tmp_path):
    """Two slow builds of different networks at once: the file holds the layers of both afterwards."""
    work = tmp_path / "work"
    other = nets.save("other", [helper.make_node("Relu", ["image"], ["scores"], name="other/relu")], [])
    request = {
        "inputs": images(), "work_dir": str(work), "workspace_mib": 64, "platform": {},
        "options": device("10.3.0").call("tensorrt_engine.options", "normalised", {"options": {}}),
    }  # fmt: skip
    code = (
        "import json, os, sys; os.environ['TENSORRT_DOUBLE_FAULT'] = 'slow_build:2'\n"
        "from jetway.tasks.on_device.tensorrt_engine import builder\n"
        "builder.build(json.loads(sys.argv[1]), lambda line: None)"
    )
    started = [
        device("10.3.0").spawn(
            code, json.dumps(request | {"onnx": path, "engine_path": str(tmp_path / name)})
        )
        for name, path in (("a", nets.plain()), ("b", other))
    ]
    for process in started:
        assert process.wait(timeout=60) == 0
    (cache,) = (work / "timing_caches").glob("*.timing")
    assert b"other/relu" in cache.read_bytes()
    assert b"stem/conv" in cache.read_bytes()


def test_no_timing_cache_when_none_is_wanted(build, nets, tmp_path):
    assert build("10.3.0", nets.plain(), timing_cache=False)["timing_cache"] is None
    assert not (tmp_path / "work/timing_caches").exists()


# What the parser says


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unsupported_operator_is_named_with_its_node(build, nets, version):
    fault = {"TENSORRT_DOUBLE_FAULT": "unsupported:Softmax"}
    with pytest.raises(Refused, match=r"operator Softmax \(node 'head/softmax'\)") as caught:
        build(version, nets.plain(), environment=fault)
    assert (caught.value.kind, caught.value.cause) == ("build_failed", "unsupported_operator")


def test_every_error_of_the_parser_is_told(build, nets):
    nodes = [
        helper.make_node("Frobnicate", ["image"], ["a"], name="first"),
        helper.make_node("Twiddle", ["a"], ["scores"], name="second"),
    ]
    with pytest.raises(Refused, match=r"Frobnicate \(node 'first'\).*Twiddle \(node 'second'\)"):
        build("8.2.1.8", nets.save("odd", nodes, []))


def test_a_broken_file_is_an_unknown_cause(build, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"this is no model" * 10)
    with pytest.raises(Refused, match="cannot take this network") as caught:
        build("10.3.0", str(tmp_path / "broken.onnx"))
    assert (caught.value.kind, caught.value.cause) == ("build_failed", "unknown")


@pytest.mark.parametrize("version", ["8.0.1.6", "11.4.0.106"])
def test_weights_in_a_file_of_their_own_are_found(build, tmp_path, version):
    nets = Networks(tmp_path)
    path = nets.plain(save_as_external_data=True, location="weights", size_threshold=0)
    assert (tmp_path / "weights").exists()
    assert build(version, path)["layers"] == 4
    (tmp_path / "weights").unlink()
    with pytest.raises(Refused):
        build(version, path)


# The DLA


WITH_DLA = [version for version in VERSIONS if version in WEAK or version in ("10.0.1", "10.3.0", "10.7.0")]
DLA = {"core": 1, "gpu_fallback": True, "layers": {}}


@pytest.mark.parametrize("version", WITH_DLA)
def test_layers_go_to_the_dla_and_what_it_cannot_run_falls_back(build, nets, version):
    facts = build(version, nets.half(), precision="fp16", dla=DLA)
    assert facts["flags"] == ["FP16", "GPU_FALLBACK"]
    placed = {entry["layer"]: entry["device"] for entry in facts["placement"]}
    assert placed == {"to_low": "GPU", "stem/conv": "DLA", "stem/relu": "DLA", "to_float": "GPU"}
    reasons = {entry["layer"]: entry["reason"] for entry in facts["placement"]}
    assert reasons["stem/conv"] == ""
    assert reasons["to_low"]


@pytest.mark.parametrize("version", ["8.5.2.2", "10.7.0", "11.4.0.106"])
def test_layers_are_placed_by_glob(build, nets, version):
    asked = DLA | {"layers": {"*relu": "GPU"}}
    (relu,) = [
        entry for entry in build(version, nets.half(), precision="fp16", dla=asked)["placement"]
        if entry["layer"] == "stem/relu"
    ]  # fmt: skip
    assert relu == {"layer": "stem/relu", "asked": "GPU", "device": "GPU", "reason": "tensorrt.dla.layers"}


def test_without_fallback_a_stranded_layer_is_an_error(build, nets):
    with pytest.raises(Refused, match=r"cannot run 2 of 4 layers: to_low, to_float") as caught:
        build("8.5.2.2", nets.half(), precision="fp16", dla=DLA | {"gpu_fallback": False})
    assert caught.value.cause == "unsupported_operator"


@pytest.mark.parametrize("version", ["8.2.1.8", "10.7.0"])
def test_the_dla_takes_int8_by_calibration(build, nets, images, version):
    facts = build(
        version, nets.plain(), precision="int8-calibrated", calibration=calibration(images), dla=DLA
    )
    assert facts["flags"] == ["GPU_FALLBACK", "INT8"]


@pytest.mark.parametrize(
    ("version", "network", "asked", "words"),
    [
        ("8.5.2.2", "half", {"precision": "fp16", "dla": DLA | {"core": 2}}, "finds 2 DLA cores"),
        ("10.13.3.9", "half", {"precision": "fp16", "dla": DLA}, "finds 0 DLA cores"),
        ("8.5.2.2", "plain", {"precision": "fp32", "dla": DLA}, "computes fp16 and int8 alone"),
        ("8.5.2.2", "quantized", {"precision": "int8", "dla": DLA}, "takes no Q/DQ nodes"),
    ],
)
def test_what_a_dla_cannot_do_is_refused(build, nets, version, network, asked, words):
    with pytest.raises(Refused, match=words):
        build(version, getattr(nets, network)(), **asked)


def test_open_shapes_are_refused_on_a_dla(build, nets):
    network = nets.plain("dynamic", ("batch", 3, 8, 8))
    shapes = {"min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [2, 3, 8, 8]}
    with pytest.raises(Refused, match="takes one shape"):
        build("8.5.2.2", network, precision="fp16", dla=DLA, profiles=[{"image": shapes}])


@pytest.mark.parametrize("version", ["8.5.2.2", "10.7.0", "11.4.0.106"])
def test_an_open_batch_runs_on_a_dla_where_its_profile_is_one_shape(build, nets, version):
    network = nets.half(shape=("batch", 3, 8, 8))
    shapes = {key: [1, 3, 8, 8] for key in ("min", "opt", "max")}
    facts = build(version, network, precision="fp16", dla=DLA, profiles=[{"image": shapes}])
    assert "DLA" in {entry["device"] for entry in facts["placement"]}


# The ladder


def ladder(device, nets, images, tmp_path, fault, version="8.2.1.8"):
    request = job_request(nets.plain(), images(), tmp_path / "work", workspace_mib=[4096, 1024, 256])
    return device(version).call("build", "run", request, "PROGRESS", TENSORRT_DOUBLE_FAULT=fault)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_build_without_memory_goes_on_with_less_workspace(device, nets, images, tmp_path, version):
    passport = ladder(device, nets, images, tmp_path, "out_of_memory_above:512", version)["passport"]
    assert passport["workspace_mib"] == 256
    outcomes = [(rung["workspace_mib"], rung["outcome"]) for rung in passport["ladder"]]
    assert outcomes == [(4096, "out_of_memory"), (1024, "out_of_memory"), (256, "built")]


def test_a_build_that_is_killed_goes_on_with_less_workspace(device, nets, images, tmp_path):
    passport = ladder(device, nets, images, tmp_path, "killed_above:2000")["passport"]
    assert passport["workspace_mib"] == 1024
    assert passport["ladder"][0]["outcome"] == "killed"
    assert "killed by SIGKILL" in passport["ladder"][0]["message"]


@pytest.mark.parametrize(
    ("fault", "cause", "words"),
    [
        ("out_of_memory_above:0", "out_of_memory", "4096 MiB out_of_memory, 1024 MiB out_of_memory, 256 MiB"),
        ("killed_above:0", "killed", "256 MiB killed"),
        ("unsupported:Softmax", "unsupported_operator", "Softmax"),
        ("disk_full", "disk_full", "Free some disk"),
        ("crash", "unknown", "was killed by SIG"),
        ("no_implementation_below:100000", "small_workspace", "larger rung"),
    ],
)
def test_failures_are_told_apart(device, nets, images, tmp_path, fault, cause, words):
    with pytest.raises(Refused, match=words) as caught:
        ladder(device, nets, images, tmp_path, fault)
    assert (caught.value.kind, caught.value.cause) == ("build_failed", cause)
    assert not list((tmp_path / "work" / "engines").iterdir())


def test_only_memory_is_worth_another_rung(device, nets, images, tmp_path):
    with pytest.raises(Refused) as caught:
        ladder(device, nets, images, tmp_path, "disk_full")
    assert "Tried" not in str(caught.value)


def test_the_end_of_the_job_ends_the_build(device, nets, images, tmp_path):
    """The supervisor of a job ends its process group; the child that builds is in it."""
    code = (
        "import json, os, sys; os.setpgid(0, 0); os.environ['TENSORRT_DOUBLE_FAULT'] = 'slow_build:60'\n"
        "from jetway.tasks.on_device import build\n"
        "build.run(json.loads(sys.argv[1]), lambda line: print(line['text'], flush=True))"
    )
    request = json.dumps(job_request(nets.plain(), images(), tmp_path / "work"))
    worker = device("10.3.0").spawn(code, request, stdout=subprocess.PIPE)
    assert any("building 4 layers" in line for line in worker.stdout)
    (child,) = children_of(worker.pid)
    os.killpg(worker.pid, signal.SIGTERM)
    assert worker.wait(timeout=10) == -signal.SIGTERM
    worker.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the build outlived its job"
        time.sleep(0.05)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
