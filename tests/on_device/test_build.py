import json
import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from jetway.tasks.on_device import machine, onnxruntime_engine, outputs, passport
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.onnx_file import OnnxFile
from jetway.tasks.on_device.onnxruntime_engine import OnnxRuntimeSession, load_options


def test_passport_says_what_the_engine_is(workplace, networks):
    built = workplace.build(networks["conv"], workplace.images(1), provenance={"parents": ["abc"]})
    facts = json.loads(Path(built["engine"] + ".json").read_text())
    assert facts == built["passport"]
    assert facts["engine_sha256"] == passport.file_sha256(built["engine"])
    assert facts["onnx_sha256"] == passport.file_sha256(str(networks["conv"]))
    assert facts["platform"]["engine_version"] == onnxruntime.__version__
    assert facts["platform"]["instruction_sets"] == machine.cpu()["instruction_sets"]
    assert facts["options"]["graph_optimization_level"] == "ORT_ENABLE_ALL"
    assert facts["options"]["intra_op_num_threads"] == 1
    assert facts["options"]["config_entries"]["session.intra_op.allow_spinning"] == "0"
    assert facts["provenance"] == {"parents": ["abc"]}
    assert facts["build_s"] > 0
    assert facts["integer_macs_ratio"] == 0.0
    assert not list(Path.cwd().iterdir())


def test_batch_norm_add_and_relu_are_fused(workplace, networks):
    operators = workplace.build(networks["conv"], workplace.images(1))["passport"]["operators"]
    assert operators["Conv"] == 2
    assert not {"BatchNormalization", "Add", "Relu"} & set(operators)


def test_macs_are_those_of_the_layers(workplace, networks):
    facts = workplace.build(networks["conv"], workplace.images(1))["passport"]
    assert facts["macs"] == 24 * 24 * (32 * 9 + 32 * 32 * 9) + 32 * 10


def test_engine_gives_what_a_plain_session_gives(workplace, networks):
    inputs = {"image": np.random.default_rng(1).standard_normal((1, 1, 24, 24), dtype=np.float32)}
    built = workplace.build(networks["conv"], workplace.images(1))
    plain = onnxruntime.InferenceSession(networks["conv"], providers=["CPUExecutionProvider"])
    engine = OnnxRuntimeSession(built["engine"], load_options({"threads": 1}))
    np.testing.assert_allclose(engine.run(inputs)[0], plain.run(None, inputs)[0], rtol=1e-5, atol=1e-6)


def quantized(onnx_path, folder):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = [np.random.default_rng(0).standard_normal((1, 1, 24, 24), dtype=np.float32)]

        def get_next(self):
            return {"image": self.left.pop()} if self.left else None

    prepared, path = folder / "prepared.onnx", folder / "int8.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quant_pre_process(onnx_path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8,
        )  # fmt: skip
    return path


def test_integer_kernels_are_counted(workplace, networks):
    """ONNX Runtime's own quantizer makes every convolution and the head integer: the share is 1."""
    path = quantized(networks["conv"], workplace.folder)
    facts = workplace.build(path, workplace.images(1))["passport"]
    assert facts["operators"]["QLinearConv"] == 2
    assert facts["integer_macs_ratio"] == pytest.approx(1.0)
    assert facts["macs"] == 24 * 24 * (32 * 9 + 32 * 32 * 9) + 32 * 10


def test_same_onnx_gives_the_same_engine_again(workplace, networks):
    first = workplace.build(networks["conv"], workplace.images(1))
    modified = os.stat(first["engine"]).st_ino
    again = workplace.build(networks["conv"], workplace.images(1))
    assert not first["reused"]
    assert again == {**first, "reused": True}
    assert os.stat(first["engine"]).st_ino == modified


def test_other_threads_give_another_engine(workplace, networks):
    one = workplace.build(networks["conv"], workplace.images(1))
    two = workplace.build(networks["conv"], workplace.images(1), threads=2)
    assert two["engine"] != one["engine"]
    assert two["passport"]["options"]["intra_op_num_threads"] == 2


def test_a_raised_revision_builds_anew(workplace, networks):
    first = workplace.build(networks["conv"], workplace.images(1))
    raised = workplace.build(networks["conv"], workplace.images(1), revision=2)
    assert not raised["reused"]
    assert raised["engine"] != first["engine"]


def test_weights_in_a_file_of_their_own_are_refused(workplace, networks):
    """The optimized file would go on pointing at them, from another folder."""
    network, path = onnx.load(networks["conv"]), workplace.folder / "split.onnx"
    onnx.save(network, path, save_as_external_data=True, location="split.weights", size_threshold=0)
    error = refusal(workplace, path, workplace.images(1))
    assert error.kind == "bad_request"
    assert "split.weights" in str(error)


def corrupt(path):
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2] ^= 0x40
    Path(path).write_bytes(data)


def test_a_corrupt_engine_is_built_anew(workplace, networks):
    first = workplace.build(networks["conv"], workplace.images(1))
    corrupt(first["engine"])
    again = workplace.build(networks["conv"], workplace.images(1))
    assert not again["reused"]
    assert passport.file_sha256(again["engine"]) == again["passport"]["engine_sha256"]


def test_a_lost_passport_means_a_new_build(workplace, networks):
    first = workplace.build(networks["conv"], workplace.images(1))
    os.unlink(first["engine"] + ".json")
    assert not workplace.build(networks["conv"], workplace.images(1))["reused"]


def test_a_corrupt_engine_is_refused(workplace, networks):
    entry = workplace.entry("conv", networks["conv"], workplace.images(1))
    corrupt(entry["path"])
    with pytest.raises(DeviceError, match="corrupt") as caught:
        passport.check(entry["path"], entry["sha256"])
    assert caught.value.kind == "corrupt"


@pytest.mark.parametrize(
    ("key", "value"),
    [("engine_version", "1.2.3"), ("architecture", "aarch64"), ("instruction_sets", ["asimd", "asimddp"])],
)
def test_an_engine_of_another_machine_is_refused(workplace, networks, key, value):
    entry = workplace.entry("conv", networks["conv"], workplace.images(1))
    facts = passport.read(entry["path"])
    facts["platform"][key] = value
    passport.write(entry["path"], facts)
    with pytest.raises(DeviceError, match=key) as caught:
        passport.check(entry["path"], entry["sha256"])
    assert caught.value.kind == "mismatch"


def refusal(workplace, path, inputs=None):
    with pytest.raises(DeviceError) as caught:
        workplace.build(path, inputs or workplace.save("x", x=np.zeros(4, dtype=np.float32)))
    assert not list(workplace.work_dir.rglob("*.engine*"))
    assert not list(Path.cwd().iterdir())
    return caught.value


def test_unsupported_operator_is_named_with_its_node(workplace):
    error = refusal(workplace, workplace.one_node("Frobnicate", "block1_frob"))
    assert (error.kind, error.cause) == ("build_failed", "unsupported_operator")
    assert "Frobnicate" in str(error)
    assert "block1_frob" in str(error)


def test_unsupported_domain_is_named(workplace):
    error = refusal(workplace, workplace.one_node("Frobnicate", domain="my.own"))
    assert (error.kind, error.cause) == ("build_failed", "unsupported_operator")
    assert "my.own:Frobnicate" in str(error)


def test_opset_too_new_is_a_mismatch(workplace):
    error = refusal(workplace, workplace.one_node("Relu", opset=onnxruntime_engine.max_opset() + 1))
    assert error.kind == "mismatch"
    assert "export.opset" in str(error)


@pytest.mark.parametrize("data", [b"", b"this is no model" * 10])
def test_a_broken_file_is_an_unknown_cause(workplace, data):
    path = workplace.folder / "broken.onnx"
    path.write_bytes(data)
    error = refusal(workplace, path)
    assert (error.kind, error.cause) == ("build_failed", "unknown")


def test_memory_that_cannot_be_had_is_out_of_memory(workplace):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["x"], ["y"], name="huge")],
        "huge",
        [value("x", TensorProto.INT64, [2])],
        [value("y", TensorProto.FLOAT, ["rows", "columns"])],
    )
    path = workplace.folder / "huge.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    error = refusal(workplace, path, workplace.save("x", x=np.array([10**6, 10**7])))
    assert error.kind == "out_of_memory"


@pytest.fixture
def small_disk(mount_disk):
    return mount_disk("300k")


def test_full_disk_is_told_before_the_build(workplace, networks, small_disk):
    workplace.work_dir = small_disk / "work"
    error = refusal(workplace, networks["conv"])
    assert (error.kind, error.cause) == ("build_failed", "disk_full")


def test_disk_that_fills_during_the_build(workplace, networks, small_disk, monkeypatch):
    """The job's folder is the small one; the work folder, which is checked first, has room."""
    images = workplace.images(1)
    monkeypatch.chdir(small_disk)
    (small_disk / "filler").write_bytes(b"\0" * (290 << 10))
    with pytest.raises(DeviceError) as caught:
        workplace.build(networks["conv"], images)
    assert (caught.value.kind, caught.value.cause) == ("build_failed", "disk_full")


def test_inputs_that_the_network_does_not_use_are_left_out(workplace):
    inputs = workplace.save("x", x=np.zeros(4, dtype=np.float32), unused=np.zeros(1, dtype=np.int64))
    assert workplace.build(workplace.one_node("Relu"), inputs)["passport"]["operators"] == {"Relu": 1}


def test_a_missing_input_is_named(workplace):
    error = refusal(workplace, workplace.one_node("Relu"), workplace.save("y", y=np.zeros(4)))
    assert error.kind == "bad_request"
    assert "'x'" in str(error)


def test_an_input_of_the_wrong_shape_is_shown(workplace):
    inputs = workplace.save("x", x=np.zeros(5, dtype=np.float32))
    assert "float32[5]" in str(refusal(workplace, workplace.one_node("Relu"), inputs))


def test_old_engines_are_swept(workplace, networks):
    built = workplace.build(networks["conv"], workplace.images(1))
    for path in Path(built["engine"]).parent.iterdir():
        os.utime(path, (0, 0))
    workplace.build(workplace.one_node("Relu"), workplace.save("x", x=np.zeros(4, dtype=np.float32)))
    assert not Path(built["engine"]).exists()


@pytest.mark.parametrize(
    ("architecture", "int8", "exact"),
    [("x86_64", [], True), ("x86_64", ["avx512_vnni"], False), ("aarch64", [], False)],
)
def test_exact_int8_kernels_only_where_the_others_saturate(architecture, int8, exact):
    entries = onnxruntime_engine.config_entries({"architecture": architecture, "int8_instruction_sets": int8})
    assert ("session.x64quantprecision" in entries) is exact


def test_an_execution_provider_that_is_not_there_is_refused(workplace, networks):
    asked = {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
    with pytest.raises(
        DeviceError, match=r"has no CUDAExecutionProvider; it has .*CPUExecutionProvider"
    ) as caught:
        workplace.build(networks["conv"], workplace.images(1), options=asked)
    assert caught.value.kind == "mismatch"


def test_the_passport_says_which_provider_ran_what(workplace, networks):
    facts = workplace.build(networks["conv"], workplace.images(1))["passport"]
    assert facts["options"]["providers"] == ["CPUExecutionProvider"]
    assert facts["placement"] == {"CPUExecutionProvider": sum(facts["operators"].values())}


class GpuRuntime:
    """ONNX Runtime with GPU providers, as far as choosing them goes; the real one is not on the test machine."""

    __version__ = "1.18.0"
    started = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")

    def __init__(self):
        self.asked = []

    def get_available_providers(self):
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, path, native, providers):
        self.asked = providers
        return self

    def get_providers(self):
        return self.started

    def disable_fallback(self):
        pass


@pytest.fixture
def gpu_runtime(monkeypatch):
    runtime = GpuRuntime()
    monkeypatch.setattr(onnxruntime_engine, "import_engine", lambda: runtime)
    return runtime


def test_what_a_provider_cannot_run_goes_to_the_next(gpu_runtime):
    providers_of = onnxruntime_engine.providers_of
    assert providers_of({}) == ["CPUExecutionProvider"]
    assert providers_of({"providers": ["CUDAExecutionProvider"]})[-1] == "CPUExecutionProvider"
    assert providers_of({"providers": ["TensorrtExecutionProvider"]}) == list(gpu_runtime.started)


def test_a_provider_that_onnxruntime_could_not_start_is_an_error(gpu_runtime):
    options = {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
    onnxruntime_engine._open("model", None, options)
    gpu_runtime.started = ("CPUExecutionProvider",)
    with pytest.raises(DeviceError, match="could not start its CUDAExecutionProvider") as caught:
        onnxruntime_engine._open("model", None, options)
    assert caught.value.kind == "mismatch"


def test_a_provider_that_fails_later_is_an_error_and_no_fallback(workplace, networks):
    """The true session, whose inner one is made to fail as a provider does."""
    from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

    class Failing:
        def __init__(self, session):
            self.session = session

        def __getattr__(self, name):
            return getattr(self.session, name)

        def run(self, *arguments):
            raise EPFail("the GPU is gone")

    options = load_options({"threads": 1})
    session = onnxruntime_engine._open(
        str(networks["conv"]), onnxruntime_engine._native_options(options), options
    )
    session._sess = Failing(session._sess)
    with pytest.raises(EPFail, match="the GPU is gone"):
        session.run(None, {"image": np.zeros((1, 1, 24, 24), np.float32)})


def test_the_tensorrt_provider_keeps_what_it_compiles_beside_the_engine(gpu_runtime, workplace, networks):
    request = {
        "threads": 1,
        "onnx": str(networks["conv"]),
        "options": {"providers": ["TensorrtExecutionProvider"]},
    }
    options = onnxruntime_engine.load_options(request)
    assert options["graph_optimization_level"] == "ORT_ENABLE_ALL"
    onnxruntime_engine._open("/work/a.engine", None, options)
    assert dict(gpu_runtime.asked)["TensorrtExecutionProvider"] == {
        "trt_engine_cache_enable": "True", "trt_engine_cache_path": "/work/a.engine.compiled",
    }  # fmt: skip
    onnxruntime_engine.build(request, "copy.engine", print)
    assert Path("copy.engine").read_bytes() == networks["conv"].read_bytes()


def test_the_tensorrt_provider_is_told_of_types_in_the_file(workplace, networks):
    int8 = OnnxFile(str(quantized(networks["conv"], workplace.folder)))
    assert onnxruntime_engine.tensorrt_flags(int8) == {"trt_int8_enable": "True"}
    assert onnxruntime_engine.tensorrt_flags(OnnxFile(str(networks["conv"]))) == {}


def test_what_an_engine_compiles_as_it_is_first_loaded_is_kept(workplace, networks, monkeypatch):
    plain = onnxruntime_engine.Session

    def session(path, options):
        compiled = Path(outputs.compiled_folder(path))
        compiled.mkdir(exist_ok=True)
        (compiled / f"{Path(path).name}.part").touch()
        return plain(path, options)

    monkeypatch.setattr(onnxruntime_engine, "Session", session)
    engine = Path(workplace.build(networks["conv"], workplace.images(1))["engine"])
    (part,) = Path(outputs.compiled_folder(str(engine))).iterdir()
    assert part.name == f"{engine.name}.part"
    assert not list(Path.cwd().iterdir())


def test_old_folders_are_swept_too(workplace, networks):
    built = workplace.build(networks["conv"], workplace.images(1))
    compiled = Path(outputs.compiled_folder(built["engine"]))
    compiled.mkdir()
    (compiled / "part").touch()
    os.utime(compiled, (0, 0))
    workplace.build(workplace.one_node("Relu"), workplace.save("x", x=np.zeros(4, dtype=np.float32)))
    assert not compiled.exists()
    assert Path(built["engine"]).exists()
