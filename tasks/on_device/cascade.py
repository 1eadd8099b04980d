"""Verb ``cascade``: two engines as one: a detector, and a classifier of what it found, frame by frame."""

import contextlib
import functools
from typing import Any, Callable, Dict, Iterator, List

from jetway.tasks.on_device import (
    benchmark,
    lease,
    machine,
    outputs,
    passport,
    power_mode,
    sessions,
    stream,
    tensors,
)
from jetway.tasks.on_device.frames import pipeline, postprocess, preprocess, resize, source
from jetway.tasks.on_device.latency import clock_ns
from jetway.tasks.on_device.telemetry import watch

ROLES = ("detector", "classifier")
STEPS = ("capture", "detect", "boxes", "crop", "classify")

Json = Dict[str, Any]


def run(request: Json, progress: Callable[[Json], None]) -> Json:
    """Sends the frames of ``source`` through each of ``pairs``, which have a ``name`` and the entries ``detector`` and
    ``classifier``, as ``sessions`` describes them.

    ``detector`` and ``classifier`` of the request declare ``input`` and ``results`` of either. Of a frame the best
    ``max_objects`` boxes are cut out, as squares of ``margin`` times the longer side; the classifier's label replaces
    the detector's, and its probability multiplies the score. ``frames`` is the number of frames of the source, and the
    other keys are those of ``stream``.

    Returns what ``stream`` returns, with the steps above, and ``results``, a file of NAME.boxes (F32 [n, 4]),
    NAME.scores (F32), NAME.labels (I64) and NAME.frame (I64) of the first ``frames`` frames, or of as many as there was
    time for.
    """
    stream.check_numpy()
    pairs = [
        {"name": pair["name"], **{role: sessions.checked(pair[role]) for role in ROLES}}
        for pair in request["pairs"]
    ]
    with power_mode.held(request["work_dir"], request.get("power_mode"), request.get("lock_clocks", False)):
        result = measure(pairs, request, progress)
    return dict(result, boot_id=lease.boot_id(), simulated=machine.simulated())


def measure(pairs: List[Json], request: Json, progress: Callable[[Json], None]) -> Json:
    """On a machine that is watched meanwhile."""
    before = machine.snapshot()
    card = watch.card_of([pair[role] for pair in pairs for role in ROLES])
    with watch.watched(request["work_dir"], card, request.get("telemetry", True)) as watched:
        with opened(pairs, request) as runners:
            session = stream.Stream(runners, request, progress)
            session.run()
            result = session.result()
    return dict(
        result,
        results=write_results(runners, request),
        frames=min(len(runner.results) for runner in runners.values()),
        reasons=session.doubts() + benchmark.throttling(before, machine.snapshot()) + watched.reasons,
    )


@contextlib.contextmanager
def opened(pairs: List[Json], request: Json) -> Iterator[Json]:
    with contextlib.ExitStack() as stack:
        runners = {}
        for pair in pairs:
            halves = []
            for role in ROLES:
                session = sessions.opened(pair[role])
                stack.callback(session.close)
                halves.append(Half(session, request[role]))
            frames = source.FrameSource(request["source"])
            runners[pair["name"]] = Cascade(frames, halves[0], halves[1], request)
        yield runners


class Half:
    """An engine with what stands before and behind it."""

    def __init__(self, session: Any, declared: Json) -> None:
        self.session, self.name = session, declared["input"]["name"]
        self.preprocess = preprocess.Preprocessor(declared["input"])
        size = declared["input"]["size"]
        self.size = (size[0], size[1])
        self.postprocess = postprocess.postprocess_of(declared["results"], self.size)

    def infer(self, pixels: Any) -> Json:
        given = {self.name: tensors.Tensor.of(pixels)}
        found = self.session.run(self.session.inputs_of(given))
        return {name: pipeline.as_array(output) for name, output in zip(self.session.output_names, found)}


class Cascade(stream.Runner):
    """Both engines on every frame, and what they found on the first ones."""

    def __init__(self, frames: source.FrameSource, detector: Half, classifier: Half, request: Json) -> None:
        super().__init__(frames, STEPS)
        self.detector, self.classifier = detector, classifier
        self.margin, self.max_objects = request["margin"], request["max_objects"]
        self.kept_frames = request["frames"]
        self.results = []  # type: List[Json]

    def warm_up(self, frames: int, depth: int) -> None:
        """Frames that are read again from the first."""
        for _ in range(frames):
            self.run_frame()
        self.source = source.FrameSource(self.source.path)
        self.results.clear()
        for times_ns in self.times_ns.values():
            del times_ns[:]

    def run_slice(self, frames: int, depth: int) -> None:
        self.run_watched(functools.partial(self.run_frames, frames))

    def run_frames(self, frames: int) -> None:
        for _ in range(frames):
            self.run_frame()

    def run_frame(self) -> None:
        moments = [clock_ns()]
        frame = self.source.read()
        moments.append(clock_ns())
        pixels, placement = self.detector.preprocess(frame)
        found = self.detector.infer(pixels)
        moments.append(clock_ns())
        found = {
            name: values[: self.max_objects]
            for name, values in self.detector.postprocess(found, placement).items()
        }
        moments.append(clock_ns())
        crops = [self.cut(frame, box) for box in found["boxes"]]
        moments.append(clock_ns())
        result = self.relabelled(found, crops)
        moments.append(clock_ns())
        for step, before, after in zip(STEPS, moments, moments[1:]):
            self.times_ns[step].append(after - before)
        if len(self.results) < self.kept_frames:
            self.results.append(result)

    def cut(self, frame: Any, box: Any) -> Any:
        """The classifier's input for what lies in a box."""
        import numpy as np

        side = max(box[2] - box[0], box[3] - box[1]) * self.margin
        crop = resize.cropped(frame, (box[:2] + box[2:]) / 2, float(side), self.classifier.size[0])
        return self.classifier.preprocess(np.rint(crop).astype(np.uint8))

    def relabelled(self, found: Json, crops: List[Any]) -> Json:
        """The boxes with the classifier's labels."""
        import numpy as np

        classes = [
            self.classifier.postprocess(self.classifier.infer(pixels), placement)
            for pixels, placement in crops
        ]
        labels = np.array([found["labels"][0] for found in classes], np.int64)
        sure = np.array([found["scores"][0] for found in classes], np.float32)
        return {
            "boxes": found["boxes"].astype(np.float32),
            "scores": (found["scores"] * sure).astype(np.float32),
            "labels": labels,
        }


def write_results(runners: Json, request: Json) -> Json:
    """What each pair found on the first frames, one after the other."""
    import numpy as np

    path = outputs.result_path(request["work_dir"], "cascade", ".safetensors")
    with tensors.TensorWriter(path) as writer:
        for name, runner in runners.items():
            counts = [len(result["labels"]) for result in runner.results]
            frame = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
            writer.add(name + ".frame", frame)
            for key in ("boxes", "scores", "labels"):
                writer.add(
                    "{}.{}".format(name, key), np.concatenate([result[key] for result in runner.results])
                )
    return {"path": path, "sha256": passport.file_sha256(path)}
