"""Work in a process of its own: it may be killed for its memory, and what it held is given back when it ends.

``{"progress": {}}`` lines come from the child's stdout, and at last ``{"result": {}}`` or ``{"error": {}}``. What it
prints goes to the job's log.
"""

import json
import os
import select
import signal
import subprocess
import sys
from importlib import import_module
from typing import Any, BinaryIO, Callable, Dict, List, Optional

from jetway.tasks.on_device import errors, job
from jetway.tasks.on_device.errors import DeviceError

MAIN = "from jetway.tasks.on_device import children; children.main()"
LOG_TAIL_CHARACTERS = 4000
#: Above the worker's own, so that the kernel takes the child first.
OOM_SCORE_ADJ = "900"

Json = Dict[str, Any]
Progress = Callable[[Json], None]


class Outcome:
    """How a child ended: ``result``, ``error`` (of a DeviceError), or a death with its ``returncode``."""

    def __init__(self, lines: List[Json], returncode: int, log: str, oom_kills: Optional[int]) -> None:
        last = lines[-1] if lines else {}
        self.result = last.get("result")  # type: Optional[Json]
        self.error = last.get("error")  # type: Optional[Json]
        self.returncode = returncode
        self.log = log
        #: Processes that the kernel killed for memory meanwhile; None where it does not count them.
        self.oom_kills = oom_kills

    def death(self) -> str:
        """What ended a child that left neither result nor error."""
        if self.returncode == -signal.SIGKILL and self.oom_kills:
            return "was killed by the kernel, as memory was short"
        if self.returncode < 0:
            return "was killed by {}".format(signal.Signals(-self.returncode).name)
        return "ended without a result (exit status {})".format(self.returncode)


def result_of(module: str, function: str, request: Json) -> Json:
    """What the function returns for the request, run in a child. Raises what it raises, as DeviceError."""
    outcome = run(module, function, request, lambda line: None)
    if outcome.result is not None:
        return outcome.result
    if outcome.error is not None:
        raise DeviceError(**outcome.error)
    text = "The process for {}.{} {}: {}".format(module, function, outcome.death(), outcome.log[-500:])
    raise DeviceError(text)


def run(
    module: str,
    function: str,
    request: Json,
    progress: Progress,
    idle: Callable[[], None] = lambda: None,
    idle_s: float = 10.0,
) -> Outcome:
    """Runs ``function(request, progress)`` in a child; ``idle`` is called after each ``idle_s`` of silence."""
    kills_before = job.oom_kills()
    child = _start({"module": module, "function": function, "request": request})
    output = Output(progress)
    pipes = {
        child.stdout.fileno(): output.add_lines,
        child.stderr.fileno(): output.add_log,
    }  # type: Dict[int, Callable[[bytes], None]]
    try:
        output.follow(pipes, idle, idle_s)
    except BaseException:
        child.kill()
        raise
    finally:
        child.stdout.close()
        child.stderr.close()
        child.wait()
    return Outcome(output.lines, child.returncode, output.log, _more(kills_before, job.oom_kills()))


def _more(before: Optional[int], after: Optional[int]) -> Optional[int]:
    return None if before is None or after is None else after - before


def _start(spec: Json) -> Any:
    """The child's Popen, with its request sent."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", MAIN]
    child = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
    child_input = child.stdin  # type: Any
    try:
        child_input.write(json.dumps(spec).encode("utf-8"))
        child_input.close()
    except BrokenPipeError:
        pass  # it died at once; its status tells
    return child


class Output:
    """What a child says: progress is handed on, its other lines are kept, and its log goes to ours as it comes."""

    def __init__(self, progress: Progress) -> None:
        self.lines = []  # type: List[Json]
        self.log = ""
        self._progress = progress
        self._rest = b""

    def follow(
        self, pipes: Dict[int, Callable[[bytes], None]], idle: Callable[[], None], idle_s: float
    ) -> None:
        """Until all pipes are closed at the other end."""
        while pipes:
            ready = select.select(list(pipes), [], [], idle_s)[0]
            if not ready:
                idle()
            for pipe in ready:
                block = os.read(pipe, 65536)
                if block:
                    pipes[pipe](block)
                else:
                    del pipes[pipe]

    def add_lines(self, block: bytes) -> None:
        *whole, self._rest = (self._rest + block).split(b"\n")
        for line in map(json.loads, (text.decode("utf-8") for text in whole)):
            if "progress" in line:
                self._progress(line["progress"])
            else:
                self.lines.append(line)

    def add_log(self, block: bytes) -> None:
        text = block.decode("utf-8", "replace")
        sys.stderr.write(text)
        sys.stderr.flush()
        self.log = (self.log + text)[-LOG_TAIL_CHARACTERS:]


def main() -> None:
    """The child's whole life."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _prefer_as_oom_victim()
    spec = json.loads(sys.stdin.read())
    function = getattr(import_module(spec["module"]), spec["function"])
    try:
        _emit(out, {"result": function(spec["request"], lambda line: _emit(out, {"progress": line}))})
    except DeviceError as exc:
        _emit(out, {"error": exc.to_json()})
    except MemoryError as exc:
        error = DeviceError("Python ran out of memory: {}".format(exc), errors.OUT_OF_MEMORY, "out_of_memory")
        _emit(out, {"error": error.to_json()})


def _emit(out: BinaryIO, line: Json) -> None:
    out.write(json.dumps(line).encode("utf-8") + b"\n")
    out.flush()


def _prefer_as_oom_victim() -> None:
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(OOM_SCORE_ADJ)
    except OSError:
        pass  # a kernel without it picks by size, which is as good
