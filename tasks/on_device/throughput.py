"""Scenario ``throughput``: trtexec's method, so that a figure can be held against trtexec's.

Each inference stream has three CUDA streams (inputs, compute, outputs) and enqueues a query while the one before
still runs, so the GPU never waits for the host. Times are the GPU's own, between events: ``latency_ms`` is the sum
of a query's transfers and its compute, without the time it waited behind the query before.

What runs is given as a work: an object whose ``copies_in``, ``enqueue`` and ``copies_out`` give bound calls for a
CUDA stream. A context of an engine is one (``execution.Lane``); ``Work`` makes one of plain functions.
"""

import gc
import time
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

from jetway.tasks.on_device import float32
from jetway.tasks.on_device.cuda import CudaRuntime, Event, Stream

DEFAULTS = {
    "streams": 1,
    "in_flight": 2,
    "cuda_graph": False,
    "transfers": True,
    "spin_wait": False,
    "warmup_ms": 200.0,
    "min_duration_s": 3.0,
}  # type: Dict[str, Any]
# Counted rounds there are at least, however long each takes.
MIN_ROUNDS = 10
# As trtexec warns.
ENQUEUE_BOUND_RATIO = 0.8
UNSTABLE_RATIO = 0.025

clock_ns = getattr(time, "perf_counter_ns", None) or (lambda: int(time.perf_counter() * 1e9))
Call = Callable[[], Any]
Json = Dict[str, Any]


def no_copies(stream: Stream) -> List[Call]:
    return []


class Work:
    """What one inference stream runs: functions that give bound calls for a stream."""

    def __init__(
        self,
        enqueue: Callable[[Stream], Call],
        copies_in: Callable[[Stream], List[Call]] = no_copies,
        copies_out: Callable[[Stream], List[Call]] = no_copies,
    ) -> None:
        self.enqueue = enqueue
        self.copies_in = copies_in
        self.copies_out = copies_out


#: One query, in milliseconds; starts and the end count from the beginning of the measurement.
Trace = NamedTuple(
    "Trace",
    [
        ("start", float),
        ("compute_start", float),
        ("end", float),
        ("h2d", float),
        ("compute", float),
        ("d2h", float),
        ("enqueue", float),
    ],
)


class Slot:
    """The events of one query in flight. Without transfers the query begins and ends with its compute."""

    def __init__(self, pipeline: "Pipeline") -> None:
        cuda, spin = pipeline.cuda, bool(pipeline.settings["spin_wait"])
        self.events = [cuda.event(spin) for _ in range(6 if pipeline.transfers else 2)]
        compute = pipeline.compute
        self.compute_start, self.compute_end = self.events[:2]
        self.before = [self.compute_start.recording_on(compute)]
        self.after = [self.compute_end.recording_on(compute)]
        self.start, self.end = self.compute_start, self.compute_end
        if pipeline.transfers:
            self._add_transfers(pipeline)
        self.wait = self.end.synchronize
        self.enqueue_ns = 0
        self.active = False

    def _add_transfers(self, pipeline: "Pipeline") -> None:
        self.start, self.h2d_end, self.d2h_start, self.end = self.events[2:]
        copies_in = pipeline.work.copies_in(pipeline.input)
        copies_out = pipeline.work.copies_out(pipeline.output)
        self.before = (
            [self.start.recording_on(pipeline.input)]
            + copies_in
            + [self.h2d_end.recording_on(pipeline.input), pipeline.compute.waiting_for(self.h2d_end)]
            + self.before
        )
        self.after += [
            pipeline.output.waiting_for(self.compute_end),
            self.d2h_start.recording_on(pipeline.output),
        ]
        self.after += copies_out + [self.end.recording_on(pipeline.output)]

    def trace(self, origin: Event, transfers: bool) -> Trace:
        """Of the query that has ended."""
        return Trace(
            start=self.start.ms_since(origin),
            compute_start=self.compute_start.ms_since(origin),
            end=self.end.ms_since(origin),
            h2d=self.h2d_end.ms_since(self.start) if transfers else 0.0,
            compute=self.compute_end.ms_since(self.compute_start),
            d2h=self.end.ms_since(self.d2h_start) if transfers else 0.0,
            enqueue=self.enqueue_ns / 1e6,
        )

    def close(self) -> None:
        for event in self.events:
            event.close()


class Pipeline:
    """One inference stream: its three CUDA streams, and a slot for each query that may be in flight."""

    def __init__(self, cuda: CudaRuntime, work: Any, settings: Json, origin: Event) -> None:
        self.cuda, self.work, self.settings, self.origin = cuda, work, settings, origin
        self.transfers = bool(settings["transfers"])
        self.input, self.compute, self.output = cuda.stream(), cuda.stream(), cuda.stream()
        self.warnings = []  # type: List[str]
        self.graph = None  # type: Any
        self.enqueue = self._launch()
        self.slots = [Slot(self) for _ in range(settings["in_flight"])]
        self.traces = []  # type: List[Trace]
        self._next = 0

    def _launch(self) -> Call:
        """The graph of the work where one is wanted and can be had."""
        enqueue = self.work.enqueue(self.compute)  # type: Call
        for copy in self.work.copies_in(self.compute):
            copy()
        if self.settings["cuda_graph"]:
            self.graph = self.cuda.captured(self.compute, enqueue, self.warnings.append)
        launch = self.graph.launch if self.graph is not None else enqueue  # type: Call
        return launch

    def query(self) -> None:
        """Enqueues one query in the slot whose turn it is, and passes the turn on."""
        slot = self.slots[self._next]
        for call in slot.before:
            call()
        started_ns = clock_ns()
        self.enqueue()
        slot.enqueue_ns = clock_ns() - started_ns
        for call in slot.after:
            call()
        slot.active = True
        self._next = (self._next + 1) % len(self.slots)

    def finish(self) -> float:
        """Waits for the oldest query if every slot is in use; returns when its compute began, in ms, or 0."""
        slot = self.slots[self._next]
        if not slot.active:
            return 0.0
        slot.wait()
        slot.active = False
        trace = slot.trace(self.origin, self.transfers)
        self.traces.append(trace)
        return trace.compute_start

    def drain(self) -> None:
        for _ in self.slots:
            self.finish()
            self._next = (self._next + 1) % len(self.slots)

    def close(self) -> None:
        for slot in self.slots:
            slot.close()
        if self.graph is not None:
            self.graph.close()
        for stream in (self.input, self.compute, self.output):
            stream.close()


def measure(cuda: CudaRuntime, works: Sequence[Any], asked: Json) -> Json:
    """Runs the works side by side, one inference stream each, and sums up. ``asked`` overrides ``DEFAULTS``."""
    settings = dict(DEFAULTS, **dict(asked, streams=len(works)))
    origin = cuda.event(bool(settings["spin_wait"]))
    pipelines = []  # type: List[Pipeline]
    try:
        for work in works:
            pipelines.append(Pipeline(cuda, work, settings, origin))
        cuda.synchronize()
        _run(pipelines, settings)
        traces = [trace for pipeline in pipelines for trace in pipeline.traces]
        report = summarize(traces, settings["warmup_ms"])
    finally:
        for pipeline in pipelines:
            pipeline.close()
        origin.close()
    told = sorted({text for pipeline in pipelines for text in pipeline.warnings})
    used_graph = all(pipeline.graph is not None for pipeline in pipelines)
    return dict(report, warnings=told + report["warnings"], settings=dict(settings, cuda_graph=used_graph))


def _run(pipelines: Sequence[Pipeline], settings: Json) -> None:
    gc.collect()
    gc.disable()
    try:
        _begin(pipelines)
        _loop(pipelines, settings["warmup_ms"], settings["min_duration_s"] * 1000.0 + settings["warmup_ms"])
        for pipeline in pipelines:
            pipeline.drain()
    finally:
        gc.enable()


def _begin(pipelines: Sequence[Pipeline]) -> None:
    """The origin of all times, which no stream may overtake."""
    first = pipelines[0]
    first.origin.recording_on(first.compute)()
    for pipeline in pipelines:
        for stream in (pipeline.input, pipeline.compute, pipeline.output):
            stream.waiting_for(first.origin)()


def _loop(pipelines: Sequence[Pipeline], warmup_ms: float, end_ms: float) -> None:
    """Until the GPU's own clock says that it is over; rounds within the warm-up do not count as rounds."""
    elapsed_ms, rounds, skipped = 0.0, 0, 0
    while rounds < MIN_ROUNDS + skipped or elapsed_ms < end_ms:
        for pipeline in pipelines:
            pipeline.query()
        for pipeline in pipelines:
            elapsed_ms = max(elapsed_ms, pipeline.finish())
        if 0.0 < elapsed_ms < warmup_ms:
            skipped += 1
        rounds += 1


def summarize(traces: Sequence[Trace], warmup_ms: float) -> Json:
    """trtexec's report of the queries whose compute began after the warm-up; times in ms."""
    ordered = sorted(traces, key=lambda trace: trace.start)
    warmup = next(
        (i for i, trace in enumerate(ordered) if trace.compute_start >= warmup_ms), len(ordered) - 1
    )
    kept = ordered[warmup:]
    walltime_ms = float32.rounded(kept[-1].end - kept[0].start)
    compute = float32.summary([trace.compute for trace in kept])
    report = {
        "queries": len(kept),
        "warmup_queries": warmup,
        "walltime_s": walltime_ms / 1000.0,
        "queries_per_s": float32.throughput_per_s(len(kept), walltime_ms),
        "latency_ms": float32.summary([latency_ms(trace) for trace in kept]),
        "enqueue_python_ms": float32.summary([trace.enqueue for trace in kept]),
        "h2d_ms": float32.summary([trace.h2d for trace in kept]),
        "gpu_compute_ms": compute,
        "d2h_ms": float32.summary([trace.d2h for trace in kept]),
        "gpu_compute_total_s": float32.rounded(compute["mean"] * len(kept)) / 1000.0,
    }  # type: Json
    return dict(report, warnings=_warnings(report))


def latency_ms(trace: Trace) -> float:
    return float32.rounded(float32.rounded(trace.h2d + trace.compute) + trace.d2h)


def _warnings(report: Json) -> List[str]:
    """What bounds the throughput besides the GPU, and whether its clocks held."""
    compute, found = report["gpu_compute_ms"], []
    if report["enqueue_python_ms"]["median"] > ENQUEUE_BOUND_RATIO * compute["median"]:
        found.append(
            "The throughput may be bound by the host's time to enqueue a query, not by the GPU: set "
            "benchmark.throughput.cuda_graph."
        )
    for key, what in (("h2d_ms", "inputs"), ("d2h_ms", "outputs")):
        if report[key]["median"] >= compute["median"]:
            text = "The throughput may be bound by the transfers of the {}, not by the GPU's compute."
            found.append(text.format(what))
    if compute["variation_ratio"] > UNSTABLE_RATIO:
        found.append(
            "The GPU's compute time varies by {:.1%}: lock its clocks.".format(compute["variation_ratio"])
        )
    return found
