"""Verb ``benchmark``: measures all variants of a target, pass by pass, and says whether the session is valid.

Every pass has a module of its own. What one pass watches must not disturb what another times, so each runs alone.
"""

import contextlib
import functools
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from jetway.tasks.on_device import (
    engines,
    latency,
    layers,
    lease,
    machine,
    memory,
    power_mode,
    power_pass,
    sessions,
    tensors,
    throughput,
    trtexec,
)
from jetway.tasks.on_device.latency import CANARY, Entrant, ReloadedEntrant
from jetway.tasks.on_device.telemetry import watch

# Share of the available memory that the engines may take together and stay loaded.
LOADED_MEMORY_RATIO = 0.7

Json = Dict[str, Any]
Progress = Callable[[Json], None]
#: Key of the result, and what measures an entry: of the entry, the request, and what is known so far.
Pass = Tuple[str, Callable[[Json, Json, Json], Any]]


def run(request: Json, progress: Progress) -> Json:
    """One session over ``engines`` and ``canary``, which are entries as ``sessions`` describes them.

    Further keys: those of the latency scenario (``warmup_runs``, ``min_queries``, ``min_duration_s``, ``slice_s``,
    ``max_drift_ratio``, ``max_extensions``, ``max_duration_s``, ``seed``), ``work_dir``, and

    - ``keep_loaded``: true holds all engines in memory, false loads each anew for its slices, which is not timed,
      and "auto" (default) decides by the memory that there is;
    - ``scenarios``: "latency" (always measured, as the ratios are its) and "throughput", with its ``throughput``;
    - ``profile_layers``: true for a table of layers and their times;
    - ``trtexec``: true, or the path of one, to hold the scenario throughput against the target's trtexec;
    - ``telemetry``: false for no samples of the sensors meanwhile;
    - ``power``: settings of the power pass, which is left out without them;
    - ``power_mode`` and ``lock_clocks``: how a Jetson is set before, and put back after.

    Every engine is checked against its passport before any is loaded. Returns peak memory by engine, what the passes
    found by engine, ``left_out`` (the passes that an engine cannot take, by engine), ``reasons`` why the session is
    not valid (none when it is), the machine before and after, what the ``telemetry`` told, and the ``power_mode``.
    """
    variants = [sessions.checked(entry) for entry in request["engines"]]
    canary = sessions.checked(dict(request["canary"], name=CANARY))
    passes = passes_of(request)
    with power_mode.held(
        request["work_dir"], request.get("power_mode"), request.get("lock_clocks", False)
    ) as mode:
        result = measure(variants, canary, passes, request, progress)
    return dict(
        result, power_mode=mode, seed=request["seed"], boot_id=lease.boot_id(), simulated=machine.simulated()
    )


def measure(
    variants: List[Json], canary: Json, passes: Sequence[Pass], request: Json, progress: Progress
) -> Json:
    """All passes, on a machine that is set up and watched; power last, as it heats the machine most."""
    progress({"done": 0.0, "total": 1.0, "text": "peak memory"})
    peaks = {entry["name"]: memory.peak_of(entry) for entry in variants}
    card, before = watch.card_of(variants), machine.snapshot()
    with watch.watched(request["work_dir"], card, request.get("telemetry", True)) as watched:
        with entered(variants + [canary], keep_loaded(request, peaks)) as entrants:
            result = latency.measure(entrants, request, progress)
        for name, measure_entry in passes:
            result[name] = {}
            for entry in filter(runs_in_flight, variants):
                progress({"done": 1.0, "total": 1.0, "text": "{} of {}".format(name, entry["name"])})
                result[name][entry["name"]] = measure_entry(entry, request, result)
    after = machine.snapshot()
    if request.get("power"):
        result["power"] = measure_power(variants, card, request, progress)
    return dict(
        result,
        memory=peaks,
        left_out=left_out(variants, passes),
        reasons=result["reasons"] + throttling(before, after) + watched.reasons,
        telemetry=watched.report,
        machine_before=before,
        machine_after=after,
    )


def passes_of(request: Json) -> List[Pass]:
    """The passes asked for besides latency, in order."""
    asked = []  # type: List[Pass]
    if "throughput" in request.get("scenarios", ()) or request.get("trtexec"):
        asked.append(("throughput", measure_throughput))
    if request.get("trtexec"):
        path = trtexec.find(None if request["trtexec"] is True else request["trtexec"])
        asked.append(("trtexec", functools.partial(measure_trtexec, path)))
    if request.get("profile_layers"):
        asked.append(("layers", measure_layers))
    return asked


def runs_in_flight(entry: Json) -> bool:
    """Whether its engine takes queries before it has answered the last, as TensorRT does."""
    return hasattr(engines.engine_of(entry["engine"]).Session, "lanes")


def left_out(variants: Sequence[Json], passes: Sequence[Pass]) -> Dict[str, List[str]]:
    """The passes that are not for an engine which answers one query before it takes the next, by engine."""
    names = [name for name, _ in passes]
    return {entry["name"]: names for entry in variants if names and not runs_in_flight(entry)}


def measure_throughput(entry: Json, request: Json, known: Json) -> Json:
    """With as many streams as the scenario or the engine's own options ask for."""
    asked = request.get("throughput", {})
    streams = max(asked.get("streams", 1), entry["load_options"].get("streams", 1))
    session, inputs = sessions.opened_with_inputs(entry)
    try:
        return throughput.measure(session.cuda, session.lanes(streams, inputs), asked)
    finally:
        session.close()


def measure_trtexec(path: str, entry: Json, request: Json, known: Json) -> Json:
    """With the settings of our own measurement, and how far that differs."""
    ours = known["throughput"][entry["name"]]
    report = trtexec.measure(path, entry["path"], ours["settings"], entry["load_options"], open_shapes(entry))
    return report if "failed" in report else dict(report, differences=trtexec.differences(ours, report))


def open_shapes(entry: Json) -> Dict[str, List[int]]:
    """The shapes of the entry's inputs that the engine leaves open."""
    session, given = sessions.opened(entry), tensors.read_tensors(entry["inputs"])
    try:
        return {name: list(given[name].shape) for name, shape in session.input_shapes.items() if -1 in shape}
    finally:
        session.close()


def measure_layers(entry: Json, request: Json, known: Json) -> List[Json]:
    return layers.measure(entry)


def measure_power(variants: Sequence[Json], card: Optional[str], request: Json, progress: Progress) -> Json:
    """Each variant is loaded for its own run."""
    return power_pass.measure(
        {entry["name"]: functools.partial(opened_query, entry) for entry in variants},
        request["power"],
        request["work_dir"],
        card,
        lambda line: progress(dict(line, done=1.0, total=1.0)),
        off_card=[entry["name"] for entry in variants if not entry["uses_gpu"]],
    )


def keep_loaded(request: Json, peaks: Dict[str, Json]) -> bool:
    """Whether all engines stay in memory together."""
    asked = request.get("keep_loaded", "auto")
    if asked != "auto":
        return bool(asked)
    device_free_mib = [peak["device_free"] for peak in peaks.values() if peak["device_free"] is not None]
    return _fits(peaks, "engine", machine.memory_mib()["available"]) and (
        _fits(peaks, "device", min(device_free_mib) if device_free_mib else None)
    )


def _fits(peaks: Dict[str, Json], key: str, available_mib: Optional[float]) -> bool:
    needed_mib = sum(peak[key] or 0.0 for peak in peaks.values())
    return available_mib is None or needed_mib <= LOADED_MEMORY_RATIO * available_mib


@contextlib.contextmanager
def entered(entries: List[Json], loaded: bool) -> Iterator[List[Entrant]]:
    """The engines as entrants of a session; those that stay loaded are closed behind it."""
    if not loaded:
        yield [ReloadedEntrant(entry["name"], functools.partial(opened_query, entry)) for entry in entries]
        return
    with contextlib.ExitStack() as stack:
        entrants = []
        for entry in entries:
            query, close = opened_query(entry)
            stack.callback(close)
            entrants.append(Entrant(entry["name"], query))
        yield entrants


def opened_query(entry: Json) -> Any:
    """The timed call of a loaded engine, and what unloads it."""
    session, inputs = sessions.opened_with_inputs(entry)
    return session.query(inputs), session.close


def throttling(before: Json, after: Json) -> List[str]:
    """What the kernel says happened to the clocks during the session."""
    found = []
    if (after["throttle_events"] or 0) > (before["throttle_events"] or 0):
        count = after["throttle_events"] - (before["throttle_events"] or 0)
        found.append("the CPU throttled {} times because it was hot".format(count))
    if before["frequencies_mhz"]["governors"] != after["frequencies_mhz"]["governors"]:
        found.append("the frequency governor changed during the session")
    return found
