"""Samples the sensors while other work runs, in a process of its own.

A thread would take the interpreter's lock from a timed loop for milliseconds at a time. The process is told to end by
its standard input being closed, which the kernel does when the one that started it dies.
"""

import json
import os
import select
import subprocess
import sys
import time
from typing import Any, Dict, Optional

from jetway.tasks.on_device import outputs, passport
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.telemetry import sensors, series

MAIN = "from jetway.tasks.on_device.telemetry import sampler; sampler.main()"
#: To open all sensors, and to write what was sampled.
PATIENCE_S = 60.0
#: The timed work comes first where both want the same core.
NICENESS = 10

Json = Dict[str, Any]


class Sampler:
    """``with Sampler(...) as sampler:`` samples in the body; afterwards there are ``series`` and ``file``.

    ``gpu`` and ``power`` are those of ``Sensors``.
    """

    def __init__(
        self, work_dir: str, interval_ms: int, gpu: Optional[str] = None, power: bool = True
    ) -> None:
        path = outputs.result_path(work_dir, "telemetry", ".safetensors")
        self._spec = {"interval_ms": interval_ms, "gpu": gpu, "power": power, "path": path}
        self._process = None  # type: Any
        self.series = series.Series()
        #: As the host pulls it.
        self.file = {"path": path}  # type: Json

    def __enter__(self) -> "Sampler":
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
        self._process = subprocess.Popen(
            [sys.executable, "-c", MAIN], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            os.write(self._process.stdin.fileno(), json.dumps(self._spec).encode("utf-8") + b"\n")
            self._expect("sampling")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        try:
            self._process.stdin.close()
            if exc_type is None:
                self._expect("written")
                self._collect()
        finally:
            self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _expect(self, word: str) -> None:
        ready = select.select([self._process.stdout], [], [], PATIENCE_S)[0]
        if not ready or self._process.stdout.readline().decode("utf-8").strip() != word:
            raise DeviceError("The process that samples the sensors failed; see the log below.")

    def _collect(self) -> None:
        path = str(self._spec["path"])
        self.series = series.read(path)
        self.file.update(sha256=passport.file_sha256(path), size_bytes=os.path.getsize(path))

    def summary(self) -> Json:
        """How often was sampled, and each column's mean, least and peak."""
        gaps = [after - before for before, after in zip(self.series.times, self.series.times[1:])]
        return {
            "samples": len(self.series.times),
            "interval_ms": None if not gaps else 1000.0 * sum(gaps) / len(gaps),
            "longest_gap_ms": None if not gaps else 1000.0 * max(gaps),
            "columns": self.series.summary(),
        }


def main() -> None:
    """The process."""
    os.nice(NICENESS)
    spec = json.loads(sys.stdin.readline())
    source = sensors.Sensors(spec["gpu"], spec["power"], spec["interval_ms"])
    try:
        sampled = sample(source, spec["interval_ms"] / 1000.0)
    finally:
        source.close()
    sampled.write(spec["path"])
    say("written")


def sample(source: sensors.Sensors, interval_s: float) -> series.Series:
    """Until standard input ends. A reading that takes longer than the interval delays the next."""
    found, due_s = series.Series(), time.monotonic()
    source.read()  # the first touches what is not in memory yet
    say("sampling")
    while True:
        before_s = time.monotonic()
        values = source.read()
        found.add((before_s + time.monotonic()) / 2.0, values)
        due_s = max(due_s + interval_s, time.monotonic())
        if select.select([sys.stdin], [], [], max(0.0, due_s - time.monotonic()))[0]:
            return found


def say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()
