"""How far a build is: by TensorRT's own steps where the version tells them."""

import threading
import time
from typing import Any, Callable, Dict, List, Optional

from jetway.tasks.on_device.tensorrt_engine import bindings

INTERVAL_S = 0.5

Progress = Callable[[Dict[str, Any]], None]


class Steps:
    """Phases within phases, each with so many steps; TensorRT's threads report them side by side.

    A broken pipe means that nobody waits for the build any more: ``go_on`` is False from then on.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._phases = {}  # type: Dict[str, Dict[str, Any]]
        self._reported_s = 0.0
        self._furthest = 0.0
        self.go_on = True

    def start(self, name: str, parent: Optional[str], steps: int) -> None:
        with self._lock:
            self._phases[name] = {"parent": parent or None, "steps": max(1, steps), "done": 0}

    def step(self, name: str, step: int) -> bool:
        with self._lock:
            if name in self._phases:
                self._phases[name]["done"] = step + 1
            self._report(name)
            return self.go_on

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def share(self) -> float:
        """Done of the first outer phase, its inner ones counted as part of its running step."""
        outer = [name for name, phase in self._phases.items() if phase["parent"] is None]
        return self._share_of(outer[0]) if outer else 0.0

    def _share_of(self, name: str) -> float:
        phase = self._phases[name]
        inner = [self._share_of(other) for other, one in self._phases.items() if one["parent"] == name]
        return float(min(1.0, (phase["done"] + max(inner or [0.0])) / phase["steps"]))

    def _report(self, name: str) -> None:
        """At most one line each half second, and never backwards: phases come that were not announced."""
        if time.monotonic() - self._reported_s < INTERVAL_S:
            return
        self._reported_s = time.monotonic()
        self._furthest = max(self._furthest, self.share())
        try:
            self._progress({"done": self._furthest, "total": 1, "text": name})
        except OSError:
            self.go_on = False


def attach(config: Any, steps: Steps) -> List[Any]:
    """Lets the build report its steps, where the version does; the caller keeps what is returned."""
    trt = bindings.module()
    if bindings.has(trt, "IProgressMonitor") and bindings.has(config, "progress_monitor"):
        config.progress_monitor = monitor = _subclass(trt.IProgressMonitor, steps)
        return [monitor]
    return []


def _subclass(base: Any, steps: Steps) -> Any:
    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            steps.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return steps.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            steps.finish(phase_name)

    return Monitor()
