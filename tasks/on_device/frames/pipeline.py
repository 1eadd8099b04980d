"""Frames through capture, preprocessing, inference and postprocessing: one after the other, and side by side.

ONNX Runtime and TensorRT release Python's lock while they compute, so that the next frame is decoded and the last
one's results are made meanwhile.
"""

import queue
import threading
from array import array
from typing import Any, Callable, Dict, List

from jetway.tasks.on_device.frames.postprocess import Postprocess
from jetway.tasks.on_device.frames.preprocess import Placement, Preprocessor
from jetway.tasks.on_device.frames.source import FrameSource
from jetway.tasks.on_device.latency import clock_ns
from jetway.tasks.on_device.tensors import Tensor

STEPS = ("capture", "preprocess", "infer", "postprocess")
_END = object()


class Pipeline:
    """An engine's session with what stands before and behind it."""

    def __init__(
        self, source: FrameSource, preprocess: Preprocessor, session: Any, postprocess: Postprocess, name: str
    ) -> None:
        self.source, self.preprocess, self.session, self.postprocess = (
            source,
            preprocess,
            session,
            postprocess,
        )
        #: The engine's input that takes the frame.
        self.name = name

    def prepare(self) -> Any:
        """The next frame as the engine's input, and its placement."""
        return self.preprocess(self.source.read())

    def infer(self, pixels: Any) -> Dict[str, Any]:
        """The engine's outputs by name, copies in and out included."""
        outputs = self.session.run(self.session.inputs_of({self.name: Tensor.of(pixels)}))
        return dict(zip(self.session.output_names, outputs))

    def finish(self, outputs: Dict[str, Any], placement: Placement) -> Any:
        arrays = {name: as_array(output) for name, output in outputs.items()}
        return self.postprocess(arrays, placement)


def as_array(output: Any) -> Any:
    return output.numpy() if isinstance(output, Tensor) else output


def run_in_turn(pipeline: Pipeline, frames: int, times_ns: "Dict[str, array[int]]") -> None:
    """Each frame from its capture to its results before the next; the time of each step is appended."""
    for _ in range(frames):
        started = clock_ns()
        frame = pipeline.source.read()
        captured = clock_ns()
        pixels, placement = pipeline.preprocess(frame)
        prepared = clock_ns()
        outputs = pipeline.infer(pixels)
        inferred = clock_ns()
        pipeline.finish(outputs, placement)
        finished = clock_ns()
        moments = (started, captured, prepared, inferred, finished)
        for step, before, after in zip(STEPS, moments, moments[1:]):
            times_ns[step].append(after - before)


def run_side_by_side(pipeline: Pipeline, frames: int, depth: int) -> int:
    """Nanoseconds from the first frame's results to the last's, with ``depth`` frames waiting between two steps.

    One thread captures and preprocesses, this one infers, a third one makes the results.
    """
    prepared = queue.Queue(depth)  # type: queue.Queue[Any]
    inferred = queue.Queue(depth)  # type: queue.Queue[Any]
    moments, failures = [], []  # type: List[int], List[Exception]

    def note(result: Any) -> None:
        moments.append(clock_ns())

    threads = [
        threading.Thread(target=_produce, args=(pipeline.prepare, frames, prepared, failures)),
        threading.Thread(target=_work, args=(lambda item: pipeline.finish(*item), inferred, note, failures)),
    ]
    for thread in threads:
        thread.start()
    _work(lambda item: (pipeline.infer(item[0]), item[1]), prepared, inferred.put, failures)
    inferred.put(_END)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return moments[-1] - moments[0]


def _produce(make: Callable[[], Any], count: int, outbox: Any, failures: List[Exception]) -> None:
    try:
        for _ in range(count):
            outbox.put(make())
    except Exception as exc:
        failures.append(exc)
    outbox.put(_END)


def _work(
    work: Callable[[Any], Any], inbox: Any, give: Callable[[Any], None], failures: List[Exception]
) -> None:
    """Once a step has failed, what still comes is taken and dropped, so that nobody waits for room."""
    for item in iter(inbox.get, _END):
        if failures:
            continue
        try:
            give(work(item))
        except Exception as exc:
            failures.append(exc)
