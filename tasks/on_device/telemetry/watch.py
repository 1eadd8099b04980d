"""Watches a machine while a session measures on it, and says afterwards whether it was itself."""

import contextlib
from typing import Any, Dict, Iterator, Optional, Sequence

from jetway.tasks.on_device import cuda
from jetway.tasks.on_device.telemetry import sensors, throttling
from jetway.tasks.on_device.telemetry.sampler import Sampler
from jetway.tasks.on_device.telemetry.series import Series

#: In a process of its own this does not show in the latency of a 1 ms query. Power is not among what is sampled: its
#: monitors hang on a slow bus, and it has a pass of its own.
INTERVAL_MS = 100

Json = Dict[str, Any]


class Watch:
    """What was found, once the body has ended."""

    def __init__(self) -> None:
        #: For the result: ``before``, ``after``, ``notes`` and, where samples were asked for, ``samples``, ``summary``.
        self.report = {}  # type: Json
        #: Why what was measured meanwhile is not the machine's.
        self.reasons = []  # type: Any


@contextlib.contextmanager
def watched(work_dir: str, gpu: Optional[str], samples: bool) -> Iterator[Watch]:
    """The machine's state is compared in any case; it is sampled in the body where ``samples`` is true."""
    watch, series, before = Watch(), Series(), throttling.state()
    if samples:
        with Sampler(work_dir, INTERVAL_MS, gpu, power=False) as sampler:
            yield watch
        series = sampler.series
        watch.report = {"samples": sampler.file, "summary": sampler.summary()}
    else:
        yield watch
    after = throttling.state()
    watch.reasons = throttling.reasons(before, after, series)
    watch.report.update(before=before, after=after, notes=throttling.notes(after, series))


def card_of(entries: Sequence[Json]) -> Optional[str]:
    """The graphics card that the engines of checked entries run on, as ``Sensors`` takes it; None for none.

    An integrated GPU has no bus: NVML, where a Jetson has it, knows one.
    """
    if not any(entry["uses_gpu"] for entry in entries):
        return None
    runtime = cuda.CudaRuntime()
    return sensors.FIRST_GPU if runtime.attribute("integrated") else runtime.pci_bus_id()
