"""The power pass: what the machine draws at rest, then with each variant running back to back, nothing timed.

Energy of a run comes from the samples, integrated, and from the device's own counter where it has one. Nothing here
knows what a variant is: it is a function that runs it once.
"""

import time
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from jetway.tasks.on_device.telemetry import sensors, throttling
from jetway.tasks.on_device.telemetry.sampler import Sampler
from jetway.tasks.on_device.telemetry.series import Series

#: Not counted at the start of each run: clocks rise, and graphics cards average their power over a second.
SETTLE_S = 2.0
#: Fewer samples than that are no mean.
MIN_SAMPLES = 5
NO_MONITOR = "this machine has no power monitor that can be read: no INA sensor, no tegrastats, no NVML"
OFF_CARD = "it does not run on the graphics card, and nothing else measures power here"

Json = Dict[str, Any]
Progress = Callable[[Json], None]
#: Loads a variant; gives what runs it once, and what unloads it.
Open = Callable[[], Tuple[Callable[[], Any], Callable[[], None]]]


class Run:
    """A stretch of the pass, by the monotonic clock, and how often the variant ran in it."""

    def __init__(self, start_s: float, end_s: float, inferences: int = 0) -> None:
        self.start_s = start_s
        self.end_s = end_s
        self.inferences = inferences
        self.reasons = []  # type: Any

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def measure(
    variants: Dict[str, Open],
    settings: Json,
    work_dir: str,
    gpu: Optional[str],
    progress: Progress,
    off_card: Sequence[str] = (),
) -> Json:
    """``settings`` are ``duration_s``, ``idle_s`` and ``interval_ms``; ``gpu`` is that of ``sensors.Sensors``.

    Returns ``variants`` by name (see ``describe``), ``idle``, the file of ``samples`` and its ``summary``, and
    ``unmeasured``: why a variant is not among them. Those of ``off_card`` do not use the graphics card; where nothing
    else measures power, nothing measures theirs.
    """
    states = []
    with Sampler(work_dir, int(settings["interval_ms"]), gpu, power=True) as sampler:
        progress({"text": "power at rest"})
        idle = rest(settings["idle_s"])
        runs = {}  # type: Dict[str, Run]
        for name, open_variant in variants.items():
            progress({"text": "power of " + name})
            states.append(throttling.state())
            runs[name] = run_back_to_back(open_variant, settings["duration_s"])
    states.append(throttling.state())
    for index, run in enumerate(runs.values()):
        part = sampler.series.between(run.start_s, run.end_s)
        run.reasons = throttling.reasons(states[index], states[index + 1], part)
    result = _evaluated(sampler.series, idle, runs, off_card)
    return dict(result, samples=sampler.file, summary=sampler.summary())


def rest(duration_s: float) -> Run:
    start_s = time.monotonic()
    time.sleep(duration_s)
    return Run(start_s, time.monotonic())


def run_back_to_back(open_variant: Open, duration_s: float) -> Run:
    """Runs the variant without a pause; the start is not counted."""
    run_once, close = open_variant()
    try:
        _repeat(run_once, SETTLE_S)
        return _repeat(run_once, duration_s)
    finally:
        close()


def _repeat(run_once: Callable[[], Any], duration_s: float) -> Run:
    count, start_s = 0, time.monotonic()
    while True:
        run_once()
        count += 1
        now_s = time.monotonic()
        if now_s - start_s >= duration_s:
            return Run(start_s, now_s, count)


def _evaluated(series: Series, idle: Run, runs: Dict[str, Run], off_card: Sequence[str]) -> Json:
    total = sensors.total_of([name for name in series.columns if series.values(name)])
    at_rest = series.between(idle.start_s, idle.end_s)
    unmeasured = {name: NO_MONITOR for name in runs if total is None}
    if total == sensors.GPU:
        unmeasured = {name: OFF_CARD for name in runs if name in off_card}
    return {
        "variants": {
            name: describe(series, at_rest, run, str(total))
            for name, run in runs.items()
            if name not in unmeasured
        },
        "unmeasured": unmeasured,
        "idle": {"duration_s": idle.duration_s, "rails": rails_of(at_rest)},
        "total": total,
    }


def describe(series: Series, at_rest: Series, run: Run, total: str) -> Json:
    """A variant's power and energy. ``total`` names what the figures without a rail's name are of.

    ``energy_mj_per_inference`` is all that the total drew, by its counter where it has one, else by its samples; with
    ``above_idle`` it is what the variant added to the machine at rest.
    """
    part = series.between(run.start_s, run.end_s)
    power, idle_w = part.statistics("power_w." + total), at_rest.statistics("power_w." + total)["mean"]
    sampled_j = series.integral("power_w." + total, run.start_s, run.end_s)
    counted_j = series.increase("energy_j." + total, run.start_s, run.end_s)
    energy_j = sampled_j if counted_j is None else counted_j
    above_idle_j = None if energy_j is None or idle_w is None else energy_j - idle_w * run.duration_s
    return {
        "total": total,
        "duration_s": run.duration_s,
        "inferences": run.inferences,
        "samples": len(part.values("power_w." + total)),
        "power_w_mean": power["mean"],
        "power_w_peak": power["peak"],
        "idle_power_w_mean": idle_w,
        "power_above_idle_w_mean": _difference(power["mean"], idle_w),
        "energy_mj_per_inference": _per_inference(energy_j, run),
        "energy_above_idle_mj_per_inference": _per_inference(above_idle_j, run),
        "energy_mj_per_inference_from_samples": _per_inference(sampled_j, run),
        "energy_mj_per_inference_from_counter": _per_inference(counted_j, run),
        "inferences_per_joule": run.inferences / energy_j if energy_j else None,
        "rails": _above_idle(rails_of(part), rails_of(at_rest)),
        "reasons": run.reasons + _shortfall(part, total),
    }


def rails_of(part: Series) -> Json:
    """``mean_w`` and ``peak_w`` of each rail, the sum and the graphics card."""
    found = {}
    for name in sorted(part.columns):
        if name.startswith("power_w.") and part.values(name):
            power = part.statistics(name)
            found[name[len("power_w.") :]] = {"mean_w": power["mean"], "peak_w": power["peak"]}
    return found


def _above_idle(rails: Json, idle: Json) -> Json:
    for name, rail in rails.items():
        rail["idle_w"] = idle.get(name, {}).get("mean_w")
        rail["above_idle_w"] = _difference(rail["mean_w"], rail["idle_w"])
    return rails


def _shortfall(part: Series, total: str) -> Any:
    count = len(part.values("power_w." + total))
    if count >= MIN_SAMPLES:
        return []
    return [
        "power was sampled {} times, fewer than {}: raise benchmark.power.duration_s".format(
            count, MIN_SAMPLES
        )
    ]


def _difference(value: Optional[float], other: Optional[float]) -> Optional[float]:
    return None if value is None or other is None else value - other


def _per_inference(energy_j: Optional[float], run: Run) -> Optional[float]:
    return None if energy_j is None else 1000.0 * energy_j / run.inferences
