"""The ctypes layer over a double of libcudart, and over real ones where they are: those have no driver here."""

import ctypes
import os
import subprocess
import sys
import time
import timeit
from pathlib import Path

import pytest

from jetway.tasks.on_device import cuda
from jetway.tasks.on_device.cuda import Buffer, CudaRuntime
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine import execution

VERSIONS = [10020, 11040, 11080, 12060, 13020]
OLD_PYTHONS = sorted(Path.home().glob(".pyenv/versions/3.6.*/bin/python"))
SLEEP = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p)


@pytest.fixture(params=VERSIONS)
def runtime(request, cudart_double):
    """A runtime of each version; everything taken of it must have been given back."""
    runtime = CudaRuntime(cudart_double(request.param))
    left = open_handles(runtime)
    yield runtime
    assert open_handles(runtime) == left


@pytest.fixture
def recent(cudart_double):
    return CudaRuntime(cudart_double(12060))


def open_handles(runtime):
    library = runtime._library
    library.cudartDoubleUsedBytes.restype = ctypes.c_size_t
    return library.cudartDoubleOpenHandles(), library.cudartDoubleUsedBytes()


def sleeping(runtime, stream, microseconds):
    """Work for the device that takes so long."""
    library = runtime._library
    library.cudartDoubleEnqueue.argtypes = [ctypes.c_void_p] * 3
    return lambda: library.cudartDoubleEnqueue(stream.handle, SLEEP, microseconds)


def test_versions_read_as_people_write_them(cudart_double):
    versions = {number: CudaRuntime(cudart_double(number)).version() for number in VERSIONS}
    assert versions == {10020: "10.2", 11040: "11.4", 11080: "11.8", 12060: "12.6", 13020: "13.2"}


def test_every_function_is_declared(runtime):
    for name, arguments in cuda.PROTOTYPES.items():
        if name not in cuda.OPTIONAL_FUNCTIONS or hasattr(runtime._library, name):
            function = getattr(runtime._library, name)
            assert tuple(function.argtypes) == arguments, name
            assert function.restype in (ctypes.c_int, ctypes.c_char_p), name


def test_every_function_that_is_called_is_declared():
    source = Path(cuda.__file__).read_text()
    body = source[source.index("class CudaRuntime") :]
    called = {name for name in cuda.PROTOTYPES if f'"{name}"' in body or f"_library.{name}(" in body}
    assert called == set(cuda.PROTOTYPES)


def test_bytes_go_to_the_device_and_back(runtime):
    stream, there = runtime.stream(), runtime.device_buffer(1000)
    source, target = runtime.pinned_buffer(1000), runtime.pinned_buffer(1000)
    source.host[:] = bytes(range(250)) * 4
    runtime.copy_in(there, source, stream)()
    runtime.copy_out(target, there, stream)()
    stream.synchronize()
    assert bytes(target.host) == bytes(range(250)) * 4
    for opened in (source, target, there, stream):
        opened.close()


def test_pointers_beyond_32_bits_arrive_whole(recent):
    buffer = recent.device_buffer(16)
    assert buffer.pointer > 2**32
    buffer.close()


@pytest.mark.parametrize("managed", [0, 1])
def test_shared_memory_needs_no_copies(cudart_double, monkeypatch, managed):
    monkeypatch.setenv("CUDART_DOUBLE_MANAGED", str(managed))
    runtime = CudaRuntime(cudart_double(11040))
    shared, target, stream = runtime.shared_buffer(8), runtime.pinned_buffer(8), runtime.stream()
    shared.host[:] = b"zerocopy"
    runtime.copy_out(target, shared, stream)()
    stream.synchronize()
    assert bytes(target.host) == b"zerocopy"
    for opened in (shared, target, stream):
        opened.close()


@pytest.mark.parametrize("spin", [True, False])
def test_events_tell_the_time_between_them(runtime, spin):
    stream, start, end = runtime.stream(), runtime.event(spin), runtime.event(spin)
    before = time.perf_counter()
    start.recording_on(stream)()
    sleeping(runtime, stream, 20_000)()
    end.recording_on(stream)()
    end.synchronize()
    elapsed_ms = (time.perf_counter() - before) * 1000
    assert 20 <= end.ms_since(start) <= elapsed_ms
    for opened in (start, end, stream):
        opened.close()


def test_a_stream_waits_for_another_ones_event(runtime):
    first, second, event = runtime.stream(), runtime.stream(), runtime.event()
    sleeping(runtime, first, 20_000)()
    event.recording_on(first)()
    second.waiting_for(event)()
    before = time.perf_counter()
    second.synchronize()
    assert time.perf_counter() - before > 0.01
    for opened in (event, first, second):
        opened.close()


def test_a_graph_repeats_what_was_captured(runtime):
    stream, there = runtime.stream(), runtime.device_buffer(4)
    source, target = runtime.pinned_buffer(4), runtime.pinned_buffer(4)
    copies = [runtime.copy_in(there, source, stream), runtime.copy_out(target, there, stream)]
    source.host[:] = b"once"
    graph = runtime.captured(stream, lambda: [copy() for copy in copies], pytest.fail)
    assert bytes(target.host) == b"once"
    for text in (b"more", b"last"):
        source.host[:] = text
        graph.launch()
        stream.synchronize()
        assert bytes(target.host) == text
    for opened in (graph, source, target, there, stream):
        opened.close()


def test_a_stream_works_on_after_a_capture_that_fails(runtime):
    stream, event = runtime.stream(), runtime.event()

    def fails():
        raise KeyError("not of CUDA")

    warnings = []
    with pytest.raises(KeyError):
        runtime.capture(stream, fails)
    with pytest.raises(DeviceError, match="Capture"):
        runtime.capture(stream, stream.synchronize)
    assert runtime.captured(stream, stream.synchronize, warnings.append) is None
    assert "without a CUDA graph" in warnings[0]
    event.recording_on(stream)()
    stream.synchronize()
    event.synchronize()
    for opened in (event, stream):
        opened.close()


@pytest.mark.parametrize(
    ("function", "status", "kind", "words"),
    [
        ("cudaMalloc", 2, "out_of_memory", "cudaErrorMemoryAllocation.*Close what else"),
        ("cudaSetDevice", 35, "mismatch", "cudaErrorInsufficientDriver.*JetPack"),
        ("cudaSetDevice", 100, "mismatch", "cudaErrorNoDevice.*group `video`"),
        ("cudaMalloc", 46, "busy", "cudaErrorDevicesUnavailable"),
        ("cudaMalloc", 700, "failed", "cudaErrorIllegalAddress.*dmesg"),
        ("cudaMalloc", 999, "failed", r"cudaMalloc failed with cudaErrorUnknown \(999\): unknown error"),
    ],
)
def test_an_error_says_what_it_means_and_what_to_do(
    cudart_double, monkeypatch, function, status, kind, words
):
    monkeypatch.setenv("CUDART_DOUBLE_FAIL", f"{function}:{status}")
    with pytest.raises(DeviceError, match=words) as caught:
        CudaRuntime(cudart_double(12060)).device_buffer(64)
    assert caught.value.kind == kind


def test_what_is_given_back_does_not_fail_again(cudart_double, monkeypatch):
    """CUDA repeats the error of earlier work in every call after it; the first must be the one that is told."""
    monkeypatch.setenv(
        "CUDART_DOUBLE_FAIL", ",".join(f"{name}:700" for name in ("cudaFree", "cudaStreamDestroy"))
    )
    runtime = CudaRuntime(cudart_double(12060))
    for opened in (runtime.stream(), runtime.device_buffer(8)):
        opened.close()


def test_more_memory_than_there_is_is_refused(recent):
    with pytest.raises(DeviceError) as caught:
        recent.device_buffer(1 << 50)
    assert caught.value.kind == "out_of_memory"


def test_facts_of_the_device(recent):
    facts = recent.facts()
    assert facts["compute_capability"] == "8.7"
    assert facts["integrated"] is False
    assert facts["memory_total_mib"] == 8192
    assert recent.device_count() == 1
    assert len(recent.pci_bus_id().split(":")) == 3


def test_a_library_is_named_by_the_environment_or_else_all_that_was_tried_is_listed(
    cudart_double, monkeypatch
):
    monkeypatch.setenv(cuda.PATH_VARIABLE, cudart_double(10020))
    assert CudaRuntime().version() == "10.2"
    monkeypatch.setenv(cuda.PATH_VARIABLE, "/no/such/libcudart.so")
    with pytest.raises(DeviceError, match=r"/no/such/libcudart\.so.*No such file|Tried") as caught:
        CudaRuntime()
    assert caught.value.kind == "mismatch"


def test_a_library_that_is_none_is_passed_over(tmp_path):
    source = tmp_path / "empty.c"
    source.write_text("int nothing(void) { return 0; }")
    library = tmp_path / "libcudart.so.12"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    with pytest.raises(DeviceError, match="undefined symbol: cuda"):
        CudaRuntime(str(library))


def test_a_library_that_the_process_has_already_comes_first(cudart_double):
    """As TensorRT brings one, and two would be one too many."""
    code = (
        "import ctypes, sys; ctypes.CDLL(sys.argv[1])\n"
        "from jetway.tasks.on_device import cuda; print(cuda.load_library()[0])"
    )
    path = cudart_double(11040)
    found = subprocess.run([sys.executable, "-c", code, path], stdout=subprocess.PIPE, check=True, text=True)
    assert os.path.samefile(found.stdout.strip(), path)


@pytest.mark.parametrize("python", OLD_PYTHONS, ids=str)
def test_all_of_it_runs_in_an_old_python(cudart_double, python, tmp_path):
    from jetway.tasks.target.agent import build_agent

    code = """
import sys
sys.path.insert(0, sys.argv[1])
from jetway.tasks.on_device.cuda import Buffer, CudaRuntime
runtime = CudaRuntime(sys.argv[2])
stream, there = runtime.stream(), runtime.device_buffer(4)
source, target = runtime.pinned_buffer(4), runtime.pinned_buffer(4)
source.host[:] = b"done"
copies = [runtime.copy_in(there, source, stream), runtime.copy_out(target, there, stream)]
graph = runtime.capture(stream, lambda: [copy() for copy in copies])
graph.launch()
stream.synchronize()
print(bytes(target.host).decode(), runtime.version())
"""
    agent = tmp_path / "agent.pyz"
    agent.write_bytes(build_agent())
    command = [python, "-c", code, agent, cudart_double(10020)]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout == "done 10.2\n"


def real_libraries():
    try:
        path, _ = cuda.load_library()
    except DeviceError:
        return []
    return [path]


@pytest.mark.parametrize("path", real_libraries())
def test_a_real_runtime_without_a_driver_says_so(path):
    """Every symbol is there and declared; there is no GPU to go on with."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice") as caught:
        CudaRuntime(path)
    assert caught.value.kind == "mismatch"


@pytest.mark.serial
def test_a_query_costs_less_than_a_hundredth_of_a_millisecond_on_the_host(tmp_path):
    """Copy in, launch, copy out, wait, against a library that does nothing: 1 % of a 1 ms inference."""
    lines = [f"int {name}(void) {{ return 0; }}" for name in cuda.PROTOTYPES]
    source, library = tmp_path / "nothing.c", tmp_path / "libcudart.so.12"
    source.write_text("\n".join(lines))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    runtime = CudaRuntime(str(library))
    stream, here, there = runtime.stream(), Buffer(8, 0, 0, print), Buffer(8, 1 << 40, 0, print)
    launch = runtime.bound("cudaGraphLaunch", 1, stream.handle)
    steps = [runtime.copy_in(there, here, stream), launch, runtime.copy_out(here, there, stream)]
    query = execution.in_turn([*steps, stream.synchronize])
    assert min(timeit.repeat(query, number=1000, repeat=20)) / 1000 < 10e-6
