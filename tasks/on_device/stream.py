"""Verb ``stream``: what a frame costs from its capture to its results, step by step, and how many pass a second."""

import contextlib
import functools
import gc
import os
import time
from array import array
from typing import Any, Callable, Dict, Iterator, List, Sequence

from jetway.tasks.on_device import (
    benchmark,
    errors,
    latency,
    lease,
    machine,
    outputs,
    passport,
    power_mode,
    sessions,
    statistics,
    tensors,
)
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.frames import pipeline, postprocess, preprocess, source
from jetway.tasks.on_device.telemetry import watch

#: Rounds among other processes are made up for until there are this many times as many as planned.
MAX_ROUNDS_FACTOR = 3

Json = Dict[str, Any]
Progress = Callable[[Json], None]


def run(request: Json, progress: Progress) -> Json:
    """Sends frames of ``source`` (a path) through each of ``engines``, entries as ``sessions`` describes them.

    ``input`` and ``results`` declare the steps around an engine, as ``frames.preprocess`` and ``frames.postprocess``
    take them. Every engine gets ``frames`` frames one after the other and again as many side by side, in rounds that
    the engines share, with up to ``queue_frames`` waiting between two steps, after ``warmup_frames``. ``power_mode``,
    ``lock_clocks``, ``telemetry`` and ``max_duration_s`` are the benchmark's.

    Returns ``samples``, a file of NAME.STEP_ns (I64) and NAME.round (I32) for each frame; ``side_by_side_ns`` by
    engine and round, between the first and the last results of ``slice_frames`` frames; the ``excluded_rounds``, in
    which other processes held the CPU; ``frame_size``; and ``reasons`` why the session is not valid.
    """
    check_numpy()
    entries = [sessions.checked(entry) for entry in request["engines"]]
    with power_mode.held(
        request["work_dir"], request.get("power_mode"), request.get("lock_clocks", False)
    ) as mode:
        result = measure(entries, request, progress)
    return dict(result, power_mode=mode, boot_id=lease.boot_id(), simulated=machine.simulated())


def check_numpy() -> None:
    if source.module("numpy") is None:
        raise DeviceError(
            "Frames need numpy on the target. Install it for the target's `python` (python3-numpy), or leave "
            "benchmark.stream out of the recipe.",
            errors.MISMATCH,
        )


def measure(entries: Sequence[Json], request: Json, progress: Progress) -> Json:
    """On a machine that is watched meanwhile."""
    before = machine.snapshot()
    with watch.watched(
        request["work_dir"], watch.card_of(entries), request.get("telemetry", True)
    ) as watched:
        with opened(entries, request) as pipelines:
            stream = Stream({name: PipelineRunner(one) for name, one in pipelines.items()}, request, progress)
            stream.run()
    after = machine.snapshot()
    return dict(
        stream.result(),
        reasons=stream.doubts() + benchmark.throttling(before, after) + watched.reasons,
        machine_before=before,
        machine_after=after,
    )


@contextlib.contextmanager
def opened(entries: Sequence[Json], request: Json) -> Iterator[Dict[str, pipeline.Pipeline]]:
    """A pipeline for each engine, by name."""
    declared, size = request["input"], tuple(request["input"]["size"])
    with contextlib.ExitStack() as stack:
        pipelines = {}
        for entry in entries:
            session = sessions.opened(entry)
            stack.callback(session.close)
            pipelines[entry["name"]] = pipeline.Pipeline(
                source.FrameSource(request["source"]),
                preprocess.Preprocessor(declared),
                session,
                postprocess.postprocess_of(request["results"], (size[0], size[1])),
                declared["name"],
            )
        yield pipelines


class Runner:
    """An engine's share of the session: the times of its frames, round by round."""

    def __init__(self, frames: source.FrameSource, steps: Sequence[str]) -> None:
        self.source = frames
        self.times_ns = {step: array("q") for step in steps}
        self.side_by_side_ns = []  # type: List[int]
        self.waiting_ratios = []  # type: List[float]

    def run_watched(self, work: Callable[[], None]) -> None:
        """Notes how long the work waited for a core that another process held."""
        waited_ns, started_ns = machine.waited_for_cpu_ns(), latency.clock_ns()
        work()
        waited_ns = machine.waited_for_cpu_ns() - waited_ns
        self.waiting_ratios.append(waited_ns / max(1, latency.clock_ns() - started_ns))


class PipelineRunner(Runner):
    """One engine, whose steps run one after the other and then side by side."""

    def __init__(self, one: pipeline.Pipeline) -> None:
        super().__init__(one.source, pipeline.STEPS)
        self.pipeline = one

    def warm_up(self, frames: int, depth: int) -> None:
        pipeline.run_side_by_side(self.pipeline, frames, depth)

    def run_slice(self, frames: int, depth: int) -> None:
        self.run_watched(functools.partial(pipeline.run_in_turn, self.pipeline, frames, self.times_ns))
        self.side_by_side_ns.append(pipeline.run_side_by_side(self.pipeline, frames, depth))


class Stream:
    """Rounds over all engines, until enough of them were calm or patience is at its end."""

    def __init__(self, runners: Dict[str, Any], request: Json, progress: Progress) -> None:
        self.runners = runners
        self.request, self.progress = request, progress
        self.planned = min(latency.MIN_ROUNDS, request["frames"])
        self.slice_frames = -(-request["frames"] // self.planned)
        self.deadline_s = time.monotonic() + request["max_duration_s"]
        self.rounds = 0

    def run(self) -> None:
        for runner in self.runners.values():
            runner.warm_up(self.request["warmup_frames"], self.request["queue_frames"])
        gc.collect()
        gc.disable()
        try:
            while len(self.calm_rounds()) < self.planned and not self.is_over():
                self.run_round()
        finally:
            gc.enable()

    def is_over(self) -> bool:
        return bool(self.rounds >= MAX_ROUNDS_FACTOR * self.planned or time.monotonic() >= self.deadline_s)

    def run_round(self) -> None:
        text = "round {}".format(self.rounds + 1)
        self.progress({"done": min(self.rounds, self.planned), "total": self.planned, "text": text})
        for runner in self.runners.values():
            runner.run_slice(self.slice_frames, self.request["queue_frames"])
        self.rounds += 1

    def calm_rounds(self) -> List[int]:
        """Rounds in whose every slice we had the CPU nearly to ourselves."""
        return [
            index
            for index in range(self.rounds)
            if all(
                runner.waiting_ratios[index] <= latency.MAX_WAITING_RATIO for runner in self.runners.values()
            )
        ]

    def counted_rounds(self) -> List[int]:
        """The calm ones; all where those are too few, and the session is invalid anyway."""
        calm = self.calm_rounds()
        return calm if len(calm) >= self.planned else list(range(self.rounds))

    def doubts(self) -> List[str]:
        """A sentence for each reason why the session is not valid."""
        calm = len(self.calm_rounds())
        if calm >= self.planned:
            return []
        if self.rounds < self.planned:
            return ["{} of {} rounds in the time there was: raise benchmark.stream.timeout_s".format(
                self.rounds, self.planned
            )]  # fmt: skip
        return [
            "other processes held the CPU in {} of {} rounds: stop them, or run again later".format(
                self.rounds - calm, self.rounds
            )
        ]

    def result(self) -> Json:
        counted = set(self.counted_rounds())
        first = next(iter(self.runners.values())).source.read()
        return {
            "samples": self.write_samples(),
            "side_by_side_ns": {name: runner.side_by_side_ns for name, runner in self.runners.items()},
            "rounds": self.rounds,
            "excluded_rounds": [index for index in range(self.rounds) if index not in counted],
            "slice_frames": self.slice_frames,
            "frame_size": [first.shape[1], first.shape[0]],
        }

    def write_samples(self) -> Json:
        path = outputs.result_path(self.request["work_dir"], "stream", ".safetensors")
        rounds = array("i", (index for index in range(self.rounds) for _ in range(self.slice_frames)))
        with tensors.TensorWriter(path) as writer:
            for name, runner in self.runners.items():
                for step, times_ns in runner.times_ns.items():
                    writer.add_bytes(
                        "{}.{}_ns".format(name, step),
                        "I64",
                        [len(times_ns)],
                        statistics.little_endian(times_ns),
                    )
                writer.add_bytes(name + ".round", "I32", [len(rounds)], statistics.little_endian(rounds))
        return {
            "path": path,
            "sha256": passport.file_sha256(path),
            "size_bytes": os.path.getsize(path),
        }
