"""Verb ``soak``: one engine back to back for minutes, in windows, with the sensors beside it.

What it finds is told window by window; whether that is a drift is the host's to say.
"""

import array
import time
from typing import Any, Callable, Dict, List, Optional

from jetway.tasks.on_device import latency, machine, memory, sessions, statistics
from jetway.tasks.on_device.telemetry import throttling, watch
from jetway.tasks.on_device.telemetry.sampler import Sampler
from jetway.tasks.on_device.telemetry.sensors import total_of
from jetway.tasks.on_device.telemetry.series import Series

#: Several samples in a window, and not so many that reading the sensors is work.
SAMPLES_A_WINDOW = 4
SHORTEST_INTERVAL_MS, LONGEST_INTERVAL_MS = 20, 1000

Json = Dict[str, Any]
Progress = Callable[[Json], None]
clock_ns = latency.clock_ns


def run(request: Json, progress: Progress) -> Json:
    """Runs ``engine`` (an entry as ``sessions`` describes it) for ``duration_s``, in windows of ``window_s``.

    Further keys: ``warmup_runs`` and ``work_dir``. Returns ``windows``, the ``telemetry`` of all sensors in figures,
    ``reasons`` why the machine was not itself (none when it was), its state before and after, and ``simulated``.
    """
    entry = sessions.checked(dict(request["engine"], name="soak"))
    session, inputs = sessions.opened_with_inputs(entry)
    try:
        query = session.query(inputs)
        for _ in range(request["warmup_runs"]):
            query()
        device_used_mib = memory.device_meter() if entry["uses_gpu"] else lambda: None
        before = throttling.state()
        card = watch.card_of([entry])
        with Sampler(request["work_dir"], interval_ms(request["window_s"]), card) as sampler:
            windows = soak(query, device_used_mib, request, progress)
        after = throttling.state()
    finally:
        session.close()
    for window in windows:
        window.update(sensed(sampler.series, window))
    return {
        "windows": windows,
        "telemetry": sampler.summary(),
        "reasons": throttling.reasons(before, after, sampler.series),
        "before": before,
        "after": after,
        "simulated": machine.simulated(),
    }


def interval_ms(window_s: float) -> int:
    wanted = int(1000 * window_s / SAMPLES_A_WINDOW)
    return min(max(wanted, SHORTEST_INTERVAL_MS), LONGEST_INTERVAL_MS)


def soak(
    query: Callable[[], Any],
    device_used_mib: Callable[[], Optional[float]],
    request: Json,
    progress: Progress,
) -> List[Json]:
    """Window after window until the time is over; at least one."""
    windows = []  # type: List[Json]
    started_s = time.monotonic()
    duration_s = request["duration_s"]
    while not windows or time.monotonic() - started_s < duration_s:
        elapsed_s = time.monotonic() - started_s
        windows.append(run_window(query, int(request["window_s"] * 1e9)))
        windows[-1].update(
            elapsed_s=elapsed_s,
            process_memory_mib=machine.process_memory_mib()["now"],
            device_memory_mib=device_used_mib(),
        )
        text = "{:.0f} queries a second".format(windows[-1]["queries_per_s"])
        progress({"done": elapsed_s, "total": duration_s, "text": text})
    return windows


def run_window(query: Callable[[], Any], window_ns: int) -> Json:
    """Queries back to back until the window is over; at least one."""
    latencies_ns = array.array("q")
    start_s, waited_ns = time.monotonic(), machine.waited_for_cpu_ns()
    started_ns = now_ns = clock_ns()
    while not latencies_ns or now_ns - started_ns < window_ns:
        before_ns = now_ns
        query()
        now_ns = clock_ns()
        latencies_ns.append(now_ns - before_ns)
    return {
        "start_s": start_s,
        "end_s": time.monotonic(),
        "queries": len(latencies_ns),
        "queries_per_s": len(latencies_ns) * 1e9 / (now_ns - started_ns),
        "latency_ms_p50": statistics.median(latencies_ns) / 1e6,
        "waiting_ratio": (machine.waited_for_cpu_ns() - waited_ns) / (now_ns - started_ns),
    }


def sensed(sampled: Series, window: Json) -> Json:
    """What the sensors said during a window: the hottest zone, the total power, the machine's memory."""
    part = sampled.between(window["start_s"], window["end_s"])
    zones = [name for name in part.columns if name.startswith("temperature_c.")]
    hottest = [max(part.values(name)) for name in zones if part.values(name)]
    total = total_of(part.columns)
    return {
        "temperature_c": max(hottest) if hottest else None,
        "power_w": part.statistics("power_w." + total)["mean"] if total else None,
        "memory_used_mib": part.statistics("memory_used_mib")["peak"],
    }
