"""The double of TensorRT itself: the rules that it holds the worker to. Nothing here says anything about TensorRT,
but that a worker which gets through it keeps to rules that were read in TensorRT's documents, issues and bindings."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import doubles
import pytest
from doubles import networks, real_bindings

OLD, MIDDLE, NEW = ("8.2.1.8", "8.6.1.6"), ("10.3.0", "10.13.3.9"), ("11.0.0.114", "11.4.0.106")
EXPLICIT, STRONG = {"network_flags": ["EXPLICIT_BATCH"]}, {"network_flags": ["STRONGLY_TYPED"]}
OPEN = [[1, 1, 8, 8], [2, 1, 8, 8], [4, 1, 8, 8]]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return networks.write_networks(tmp_path_factory.mktemp("networks"))


def cases(version, files):
    """Builds by name. The network is weakly typed where the version has that, except in those named strong."""
    base = EXPLICIT if version in OLD else {}
    strong = STRONG if version in MIDDLE else base
    return {
        "fp32": {"onnx": files["fp32"], **base},
        "fp16 file": {"onnx": files["fp16"], **base},
        "fp16 file, flag": {"onnx": files["fp16"], "flags": ["FP16"], **base},
        "fp16 wish": {"onnx": files["fp32"], "precision": "HALF", **base},
        "bf16 file, strong": {"onnx": files["bf16"], **strong},
        "fp16 file, strong": {"onnx": files["fp16"], **strong},
        "fp16 file, strong, flag": {"onnx": files["fp16"], "flags": ["FP16"], **strong},
        "int8 file": {"onnx": files["int8"], **base},
        "int8 file, flag": {"onnx": files["int8"], "flags": ["INT8"], **base},
        "int8 file, strong": {"onnx": files["int8"], **strong},
        "int8 file, flag, calibrator": {"onnx": files["int8"], "flags": ["INT8"], "calibrate": "", **base},
        "int8 flag": {"onnx": files["fp32"], "flags": ["INT8"], **base},
        "int8 flag, calibrator": {"onnx": files["fp32"], "flags": ["INT8"], "calibrate": "", **base},
        "open": {"onnx": files["open"], **base},
        "open, profile": {"onnx": files["open"], "profile": OPEN, **base},
        "open, mixed profile": {"onnx": files["open"], "profile": OPEN[::-1], **base},
        "fp32, wrong profile": {"onnx": files["fp32"], "profile": OPEN, **base},
        "implicit batch": {"onnx": files["fp32"]},
        "dla": {"onnx": files["fp16"], "dla": 0, "flags": ["FP16"] if version in OLD else [], **strong},
        "ampere": {"onnx": files["fp32"], "ampere": True, **base},
    }


@pytest.fixture(scope="session", params=[*OLD, *MIDDLE, *NEW])
def version(request):
    return request.param


@pytest.fixture(scope="session")
def builds(version, files, tensorrt_double):
    environment = os.environ | tensorrt_double(version, CUDART_DOUBLE_COMPUTE_CAPABILITY="7.5")
    done = subprocess.run(
        [sys.executable, doubles.FOLDER / "try_builds.py"],
        input=json.dumps(cases(version, files)), env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def built(builds, name):
    return builds[name]["built"]


def words(builds, name):
    assert not builds[name]["built"]
    return " ".join(builds[name]["errors"])


def test_a_float_network_is_built_everywhere(builds):
    assert built(builds, "fp32")
    assert built(builds, "open, profile")


def test_weak_typing_wants_a_flag_for_each_type_in_the_file(builds, version):
    if version in NEW:
        assert built(builds, "fp16 file")
        assert built(builds, "int8 file")
        assert words(builds, "fp16 file, flag").endswith("no attribute 'FP16'")
        assert builds["fp16 wish"]["raised"] == "AttributeError"
        return
    assert "fp16 is not configured" in words(builds, "fp16 file")
    assert "fp16 is not configured" in words(builds, "fp16 wish")
    assert "int8 is not configured" in words(builds, "int8 file")
    assert built(builds, "fp16 file, flag")
    assert built(builds, "int8 file, flag")


def test_strong_typing_bears_no_flag(builds, version):
    if version not in MIDDLE:
        pytest.skip("only TensorRT 10 has both")
    assert built(builds, "fp16 file, strong")
    assert built(builds, "int8 file, strong")
    assert "!config.getFlag(BuilderFlag::kFP16)" in words(builds, "fp16 file, strong, flag")


def test_bf16_came_with_version_10_and_wants_ampere(builds, version):
    wanted = "data type 16" if version in OLD else "bf16 is not supported on this GPU"
    assert wanted in words(builds, "bf16 file, strong")


def test_int8_needs_ranges_from_one_place(builds, version):
    if version in NEW:
        assert builds["int8 flag, calibrator"]["raised"] == "AttributeError"
        return
    assert "no scaling factors" in words(builds, "int8 flag")
    assert "a calibrator is set for a network with Q/DQ" in words(builds, "int8 file, flag, calibrator")
    assert "the calibrator gave no batch" in words(builds, "int8 flag, calibrator")


def test_open_shapes_need_a_profile_that_fits(builds):
    assert "no optimization profile" in words(builds, "open")
    assert builds["open, mixed profile"]["raised"] == "RuntimeError"
    assert "does not fit the network" in words(builds, "fp32, wrong profile")


def test_networks_of_8_need_the_flag_for_an_explicit_batch(builds, version):
    assert built(builds, "implicit batch") == (version not in OLD)


def test_a_dla_that_is_not_there_is_refused(builds):
    assert "DLA core 0 is not on this platform" in words(builds, "dla")


def test_hardware_compatibility_needs_the_name_and_an_ampere_gpu(builds, version):
    assert ("Ampere" in words(builds, "ampere")) == (version != "8.2.1.8")


def python_with_double(environment, code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


PLANS = """
    import sys, tensorrt as trt
    logger = trt.Logger(trt.Logger.ERROR)
    def plan_of(path):
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        assert trt.OnnxParser(network, logger).parse_from_file(path)
        return bytes(builder.build_serialized_network(network, builder.create_builder_config()))
"""


def test_a_plan_fits_its_version_and_its_gpu_and_must_be_whole(files, tensorrt_double, tmp_path):
    path = tmp_path / "plan"
    code = PLANS + "    open(sys.argv[2], 'wb').write(plan_of(sys.argv[1]))"
    assert not python_with_double(tensorrt_double("10.3.0"), code, files["fp32"], str(path)).stderr
    load = """
        import sys, tensorrt as trt
        plan = open(sys.argv[1], "rb").read()
        half = plan[: len(plan) // 2] + b"?" + plan[len(plan) // 2 + 1 :]
        logger = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(logger)
        print([runtime.deserialize_cuda_engine(each) is not None for each in (plan, half, plan[:-1], b"")])
    """
    same = python_with_double(tensorrt_double("10.3.0"), load, str(path))
    assert same.stdout == "[True, False, False, False]\n"
    newer = python_with_double(tensorrt_double("10.7.0"), load, str(path))
    assert newer.stdout.startswith("[False")
    assert "expecting library version 10.7.0 got 10.3.0" in newer.stderr
    other = python_with_double(
        tensorrt_double("10.3.0", CUDART_DOUBLE_COMPUTE_CAPABILITY="9.0"), load, str(path)
    )
    assert "incompatible device" in other.stderr


@pytest.mark.parametrize("base", ["ILogger", "IProfiler", "IProgressMonitor", "IInt8EntropyCalibrator2"])
def test_a_subclass_must_call_the_init_of_its_base(base, tensorrt_double):
    code = f"import tensorrt as trt\nclass Mine(trt.{base}):\n    def __init__(self): pass\nMine()"
    done = python_with_double(tensorrt_double("10.3.0"), code)
    assert (
        f"TypeError: tensorrt.tensorrt.{base}.__init__() must be called when overriding __init__"
        in done.stderr
    )


def test_a_callback_that_nobody_keeps_is_a_crash(tensorrt_double):
    """Stricter than newer bindings, which keep some alive: the worker promises to keep them all."""
    code = "import tensorrt as trt\ntrt.Builder(trt.Logger()).logger"
    done = python_with_double(tensorrt_double("10.3.0"), code)
    assert done.returncode < 0
    assert "garbage-collected while TensorRT holds a pointer" in done.stderr


def test_what_a_version_lacks_can_be_neither_read_nor_set(tensorrt_double):
    code = """
        import tensorrt as trt
        logger = trt.Logger()
        builder = trt.Builder(logger)
        config = builder.create_builder_config()
        def error_of(action):
            try:
                return str(action())
            except AttributeError as exc:
                return "AttributeError"
        print(error_of(lambda: config.max_workspace_size))
        print(error_of(lambda: setattr(config, "max_workspace_size", 1)))
        print(error_of(lambda: setattr(config, "no_such_thing", 1)))
        print(error_of(lambda: trt.BuilderFlag.STRICT_TYPES))
        print(error_of(lambda: setattr(builder, "num_DLA_cores", 1)))
    """
    assert python_with_double(tensorrt_double("10.3.0"), code).stdout == "AttributeError\n" * 5


def test_a_name_that_is_not_acted_out_says_so(tensorrt_double):
    code = "import tensorrt as trt\ntrt.Builder(trt.Logger()).gpu_allocator"
    done = python_with_double(tensorrt_double("10.3.0"), code)
    assert "NotImplementedError: The double of TensorRT does not act out Builder.gpu_allocator" in done.stderr


def test_it_must_be_told_which_version_it_is():
    done = python_with_double({"PYTHONPATH": str(doubles.TENSORRT_PATH)}, "import tensorrt")
    assert "set TENSORRT_DOUBLE_VERSION" in done.stderr


def test_values_are_those_of_the_real_bindings(tmp_path, tensorrt_double):
    """How Dims and enums behave, here and in the real bindings where they can be had."""
    code = """
        import tensorrt as trt
        def told(action):
            try:
                return repr(action())
            except Exception as exc:
                return type(exc).__name__
        dims = trt.Dims((1, 2, 3))
        print([told(action) for action in (
            lambda: (dims == (1, 2, 3), (1, 2, 3) == dims, dims == [1, 2]), lambda: dims == trt.Dims((1, 2, 3)),
            lambda: dims[0:2], lambda: dims[5], lambda: hash(dims), lambda: (len(dims), tuple(dims), str(dims)),
            lambda: trt.Dims([1, -1]), lambda: trt.DataType.HALF, lambda: str(trt.DataType.HALF),
            lambda: trt.DataType(1).name, lambda: trt.DataType(99), lambda: 1 << trt.DataType.HALF,
            lambda: trt.DataType.HALF | trt.DataType.FLOAT, lambda: trt.DataType.FLOAT == 0,
            lambda: {trt.DataType.FLOAT: 1}[trt.DataType(0)], lambda: int(trt.DataType.HALF),
            lambda: list(trt.DataType.__members__) != [], lambda: trt.IBuilderConfig(), lambda: trt.Logger(2),
            lambda: trt.Logger().min_severity, lambda: trt.Logger().foo, lambda: setattr(trt.Logger(), "foo", 1),
            lambda: trt.volume((2, 3)), lambda: trt.DataType.HALF.itemsize, lambda: trt.Logger().log(1, "x"),
        )])
    """
    ours = python_with_double(tensorrt_double("10.3.0"), code).stdout
    assert ours.count("TypeError") == 7
    try:
        bindings = real_bindings.Bindings("10.3.0", tmp_path)
    except real_bindings.NotAvailable as exc:
        pytest.skip(str(exc))
    assert bindings.run("-c", textwrap.dedent(code)) == ours


# The double of libcudart


CUDA = """
    import ctypes, os, sys
    cuda = ctypes.CDLL(os.environ["JETWAY_LIBCUDART"])
    pointer, stream = ctypes.c_void_p(), ctypes.c_void_p()
    def took(name, *arguments):
        return getattr(cuda, name)(*arguments)
    assert took("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(64)) == 0
"""


def test_the_host_cannot_touch_device_memory(tensorrt_double):
    done = python_with_double(tensorrt_double("10.3.0"), CUDA + "    ctypes.string_at(pointer.value, 1)")
    assert done.returncode == -signal.SIGSEGV


def test_cuda_does_not_work_in_a_fork(tensorrt_double):
    code = CUDA + "    print(took('cudaFree', pointer) if os.fork() == 0 else os.wait()[1])"
    assert python_with_double(tensorrt_double("10.3.0"), code).stdout == "3\n0\n"


def test_pageable_memory_is_read_at_once_and_pinned_memory_when_the_stream_comes_to_it(tensorrt_double):
    code = (
        CUDA
        + """
    host = ctypes.c_void_p()
    assert took("cudaHostAlloc", ctypes.byref(host), ctypes.c_size_t(64), 0) == 0
    assert took("cudaStreamCreateWithFlags", ctypes.byref(stream), 0) == 0
    sleep = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p)
    for source in (ctypes.create_string_buffer(b"a" * 64), (ctypes.c_char * 64).from_address(host.value)):
        source.raw = b"a" * 64
        assert took("cudartDoubleEnqueue", stream, sleep, ctypes.c_void_p(100000)) == 0
        assert took("cudaMemcpyAsync", pointer, source, ctypes.c_size_t(64), 1, stream) == 0
        source.raw = b"b" * 64
        back = ctypes.create_string_buffer(64)
        assert took("cudaMemcpyAsync", back, pointer, ctypes.c_size_t(64), 2, stream) == 0
        print(back.raw[:1].decode())
    """
    )
    assert python_with_double(tensorrt_double("10.3.0"), code).stdout == "a\nb\n"


@pytest.mark.parametrize(("fault", "calls"), [("cudaFree:700", [700, 700]), ("cudaFree:700:2", [0, 700])])
def test_a_call_fails_as_the_environment_asks(tensorrt_double, fault, calls):
    code = CUDA + "    print([took('cudaFree', None), took('cudaFree', None)])"
    environment = tensorrt_double("10.3.0", CUDART_DOUBLE_FAIL=fault)
    assert python_with_double(environment, code).stdout == f"{calls}\n"
