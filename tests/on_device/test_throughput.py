"""trtexec's method over a double of libcudart, whose streams are threads and whose kernels sleep."""

import ctypes
import time

import numpy as np
import pytest

from jetway.tasks.on_device import throughput
from jetway.tasks.on_device.cuda import CudaRuntime
from jetway.tasks.on_device.throughput import Trace, Work

pytestmark = pytest.mark.serial

SLEEP = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p)
SHORT = {"warmup_ms": 20.0, "min_duration_s": 0.2}


@pytest.fixture(params=[10020, 12060])
def runtime(request, cudart_double):
    runtime = CudaRuntime(cudart_double(request.param))
    runtime._library.cudartDoubleEnqueue.argtypes = [ctypes.c_void_p] * 3
    before = runtime._library.cudartDoubleOpenHandles()
    yield runtime
    assert runtime._library.cudartDoubleOpenHandles() == before


def kernel(runtime, microseconds):
    """Makes the bound call that puts a sleep on a stream."""
    return lambda stream: lambda: runtime._library.cudartDoubleEnqueue(stream.handle, SLEEP, microseconds)


def kernels(runtime, microseconds):
    return lambda stream: [kernel(runtime, microseconds)(stream)]


def overlap(report):
    """How many queries are under way at a time, by their own transfers and compute: a busy machine stretches both."""
    return report["latency_ms"]["mean"] * report["queries"] / 1e3 / report["walltime_s"]


def test_the_device_is_never_idle_while_a_query_waits(runtime):
    """Two in flight: a query every 2 ms, though each takes 1 + 2 + 1 ms and is enqueued 3 ms before its end."""
    work = Work(kernel(runtime, 2000), kernels(runtime, 1000), kernels(runtime, 1000))
    report = throughput.measure(runtime, [work], SHORT)
    assert overlap(report) > 1.2
    assert report["queries_per_s"] < 500
    assert 2.0 <= report["gpu_compute_ms"]["median"] < 3.0
    assert 1.0 <= report["h2d_ms"]["median"] < 1.9
    assert 1.0 <= report["d2h_ms"]["median"] < 1.9
    assert 4.0 <= report["latency_ms"]["median"] < 6.0
    assert report["enqueue_python_ms"]["median"] < 0.5
    assert report["walltime_s"] > 0.19
    assert report["queries"] == pytest.approx(report["queries_per_s"] * report["walltime_s"], rel=1e-3)
    assert report["settings"]["in_flight"] == 2


def test_one_in_flight_waits_for_each(runtime):
    work = Work(kernel(runtime, 2000), kernels(runtime, 1000), kernels(runtime, 1000))
    report = throughput.measure(runtime, [work], {**SHORT, "in_flight": 1, "spin_wait": True})
    assert overlap(report) <= 1.0
    assert report["queries_per_s"] < 250


def test_streams_run_side_by_side(runtime):
    works = [Work(kernel(runtime, 2000)) for _ in range(3)]
    report = throughput.measure(runtime, works, SHORT)
    assert overlap(report) > 1.8
    assert report["queries_per_s"] < 1500
    assert report["settings"]["streams"] == 3


def test_transfers_can_be_left_out(runtime):
    """A query begins and ends with its compute then."""
    work = Work(kernel(runtime, 2000), kernels(runtime, 50_000), kernels(runtime, 50_000))
    report = throughput.measure(runtime, [work], {**SHORT, "transfers": False})
    assert report["h2d_ms"]["max"] == report["d2h_ms"]["max"] == 0.0
    assert report["latency_ms"] == report["gpu_compute_ms"]
    assert report["queries_per_s"] < 500


def test_a_graph_is_launched_instead(runtime):
    enqueued = []

    def enqueue(stream):
        call = kernel(runtime, 1000)(stream)
        return lambda: (enqueued.append(1), call())

    report = throughput.measure(runtime, [Work(enqueue)], {**SHORT, "cuda_graph": True})
    assert len(enqueued) == 2
    assert report["queries"] > 50
    assert report["settings"]["cuda_graph"] is True


def test_what_cannot_be_captured_runs_without_a_graph_and_says_so(runtime):
    def enqueue(stream):
        call = kernel(runtime, 1000)(stream)
        return lambda: (call(), stream.synchronize())

    report = throughput.measure(runtime, [Work(enqueue)], {**SHORT, "cuda_graph": True})
    assert "cannot be captured" in report["warnings"][0]
    assert report["settings"]["cuda_graph"] is False
    assert report["queries"] > 50


def test_at_least_ten_rounds_count_beside_the_warm_up(runtime):
    report = throughput.measure(
        runtime, [Work(kernel(runtime, 10_000))], {"warmup_ms": 35.0, "min_duration_s": 0.0}
    )
    assert report["warmup_queries"] >= 3
    assert report["queries"] >= 10


def test_a_slow_host_is_told(runtime):
    def enqueue(stream):
        call = kernel(runtime, 1000)(stream)
        return lambda: (call(), time.sleep(0.002))

    report = throughput.measure(runtime, [Work(enqueue, kernels(runtime, 2000))], SHORT)
    assert any("cuda_graph" in text for text in report["warnings"])
    assert any("transfers of the inputs" in text for text in report["warnings"])


def traces(count, *, random, start_ms=0.0):
    starts = start_ms + np.cumsum(random.uniform(0.5, 1.5, count))
    found = []
    for start in starts:
        h2d, compute, d2h = random.uniform(0.1, 0.3), random.uniform(1.0, 1.2), random.uniform(0.1, 0.2)
        found.append(
            Trace(
                start=start,
                compute_start=start + h2d,
                end=start + h2d + compute + d2h + 0.5,
                h2d=float(np.float32(h2d)),
                compute=float(np.float32(compute)),
                d2h=float(np.float32(d2h)),
                enqueue=0.02,
            )
        )
    return found


def test_queries_that_began_in_the_warm_up_do_not_count_and_streams_are_merged():
    random = np.random.default_rng(0)
    first, second = traces(300, random=random), traces(250, random=random)
    report = throughput.summarize(first + second, warmup_ms=100.0)
    every = sorted(first + second, key=lambda trace: trace.start)
    kept = [trace for trace in every if trace.compute_start >= 100.0]
    assert report["warmup_queries"] == len(every) - len(kept)
    assert report["queries"] == len(kept)
    walltime_ms = kept[-1].end - kept[0].start
    assert report["queries_per_s"] == pytest.approx(len(kept) / walltime_ms * 1000, rel=1e-6)
    latencies = sorted(
        np.float32(np.float32(t.h2d) + np.float32(t.compute)) + np.float32(t.d2h) for t in kept
    )
    assert report["latency_ms"]["min"] == float(latencies[0])
    assert report["latency_ms"]["p99"] == float(latencies[len(kept) - 1 - int(0.01 * len(kept))])
    assert "varies by" in report["warnings"][-1]
