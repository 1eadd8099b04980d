"""A build with less and less workspace, each try in a process of its own, until the target's memory is enough."""

import time
from typing import Any, Callable, Dict, List, Optional

from jetway.tasks.on_device import children, outputs
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine import failure

BUILDER = "jetway.tasks.on_device.tensorrt_engine.builder"

Json = Dict[str, Any]
Progress = Callable[[Json], None]
Run = Callable[..., children.Outcome]


def build(request: Json, progress: Progress, run: Run = children.run) -> Json:
    """Walks down ``options.workspace_mib``. Returns the facts of the build that went well, with ``workspace_mib``
    and the ``ladder``: what became of each rung.

    Raises DeviceError of the last rung, or at once where less memory cannot help.
    """
    rungs, failures = [], []  # type: List[Json], List[DeviceError]
    for workspace_mib in request["options"]["workspace_mib"]:
        started = time.monotonic()
        outcome = _try(request, workspace_mib, progress, run)
        error = failure.of_outcome(outcome)
        rungs.append(_rung(workspace_mib, error, time.monotonic() - started))
        if error is None:
            return dict(outcome.result or {}, workspace_mib=workspace_mib, ladder=rungs)
        failures.append(error)
        outputs.remove(request["engine_path"])
        progress(
            {"done": 0, "total": 1, "text": "{} MiB of workspace: {}".format(workspace_mib, error.cause)}
        )
        if error.cause not in failure.MEMORY_CAUSES:
            break
    raise _told(failures[-1], rungs)


def _try(request: Json, workspace_mib: int, progress: Progress, run: Run) -> children.Outcome:
    text = "building with {} MiB of workspace".format(workspace_mib)
    progress({"done": 0, "total": 1, "text": text})
    clock = Clock(text, progress)
    asked = dict(request, workspace_mib=workspace_mib)
    return run(BUILDER, "build", asked, clock.relay, clock.tick)


class Clock:
    """Says that a build which is silent goes on: older versions tell nothing between parsing and the end."""

    def __init__(self, text: str, progress: Progress) -> None:
        self._text, self._progress = text, progress
        self._started_s = time.monotonic()
        self._done = 0.0

    def relay(self, line: Json) -> None:
        self._done = line["done"] / line["total"]
        self._progress(dict(line, text="{}: {}".format(self._text, line["text"])))

    def tick(self) -> None:
        seconds = time.monotonic() - self._started_s
        self._progress({"done": self._done, "total": 1, "text": "{}: {:.0f} s".format(self._text, seconds)})


def _rung(workspace_mib: int, error: Optional[DeviceError], seconds: float) -> Json:
    return {
        "workspace_mib": workspace_mib,
        "outcome": "built" if error is None else error.cause,
        "message": "" if error is None else str(error),
        "seconds": round(seconds, 3),
    }


def _told(error: DeviceError, rungs: List[Json]) -> DeviceError:
    """The error, with the other rungs if there were any."""
    if len(rungs) == 1:
        return error
    tried = ", ".join("{workspace_mib} MiB {outcome}".format(**rung) for rung in rungs)
    return DeviceError("{} Tried tensorrt.workspace_mib: {}.".format(error, tried), error.kind, error.cause)
