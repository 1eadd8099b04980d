"""Whether the machine was itself while it was measured: what slowed it down, by counters, by samples, by settings."""

from typing import Any, Dict, List, Optional

from jetway.tasks.on_device import machine, power_mode
from jetway.tasks.on_device.telemetry import clocks, nvml, thermal
from jetway.tasks.on_device.telemetry.series import Series
from jetway.tasks.on_device.telemetry.thermal import LOW_VOLTAGE_EVENT, OVER_CURRENT_EVENTS

#: A GPU with that much to do should run at its highest clock.
BUSY_RATIO = 0.9
#: Below that share of the highest clock it does not.
FULL_CLOCK_RATIO = 0.95
#: That share of the samples may say so before it counts: a governor takes a moment.
TOLERATED_RATIO = 0.1
#: What makes a graphics card slower than it is. Its power limit is not among them: every card has one and keeps to it.
FAULTS = {
    "hw_slowdown": "was slowed down by its hardware",
    "sw_thermal_slowdown": "was slowed down because it was hot",
    "hw_thermal_slowdown": "was slowed down by its hardware because it was hot",
    "hw_power_brake": "was slowed down because the power supply asked for it",
}
UNSEEN_ALARMS = (
    "over-current alarms would not have been seen: this board has no counters, and this user may not read the kernel's "
    "log (sudo sysctl kernel.dmesg_restrict=0 lets it)"
)
ADVICE = "cool the board, feed it better, or choose a lower power mode"

Json = Dict[str, Any]


def state() -> Json:
    """What is compared before and after a measurement, and goes into its result.

    ``alarms_unseen``: a Jetson that counts no over-current events, and whose log of them this user may not read.
    """
    counts, alarms = thermal.event_counts(), thermal.logged_alarms()
    return {
        "power_mode": power_mode.current(),
        "clock_limits": clocks.limits(),
        "event_counts": counts,
        "logged_alarms": alarms,
        "alarms_unseen": machine.l4t_release() is not None and not counts and alarms is None,
        "low_voltage_alarm": thermal.low_voltage_alarm(),
        "fan": thermal.fan(),
    }


def reasons(before: Json, after: Json, samples: Series) -> List[str]:
    """A sentence for each reason why what was measured in between is not the machine's."""
    return (
        _changed_settings(before, after)
        + _events(before["event_counts"], after["event_counts"], after["power_mode"])
        + _alarms(before, after)
        + _cooling(samples)
        + _slow_gpu(samples, before["clock_limits"].get("gpu"))
        + _slow_cores(samples, before["clock_limits"])
        + _card_faults(samples)
    )


def notes(after: Json, samples: Series) -> List[str]:
    """For the reader: what held a graphics card's clocks back by right, and what nobody could have seen."""
    found = [UNSEEN_ALARMS] if after["alarms_unseen"] else []
    ratio = _ratio_with(samples, "sw_power_cap")
    if ratio > TOLERATED_RATIO:
        found.append("the GPU was at its power limit in {:.0%} of the samples".format(ratio))
    return found


def _changed_settings(before: Json, after: Json) -> List[str]:
    found = []
    if before["power_mode"] != after["power_mode"]:
        text = "the power mode changed from {} to {} during the session"
        found.append(text.format(before["power_mode"], after["power_mode"]))
    limits = before["clock_limits"], after["clock_limits"]
    for name in sorted(set(limits[0]) | set(limits[1])):
        old, new = (side.get(name, {}).get("max_mhz") for side in limits)
        if old != new:
            text = "the highest clock of {} changed from {} to {} during the session"
            found.append(text.format(name, _mhz(old), _mhz(new)))
    return found


def _mhz(value: Optional[float]) -> str:
    return "off" if value is None else "{:.0f} MHz".format(value)


def _events(before: Dict[str, int], after: Dict[str, int], mode: Optional[str]) -> List[str]:
    found = []
    for counter in sorted(after):
        count = after[counter] - before.get(counter, 0)
        if count > 0:
            text, why = "the board throttled {} times because {} ({}): {}", OVER_CURRENT_EVENTS[counter]
            found.append(text.format(count, why, counter.upper(), _event_advice(counter, mode)))
    return found


def _event_advice(counter: str, mode: Optional[str]) -> str:
    """An Orin Nano without a power limit (MAXN_SUPER) throttles so all the time: its mode is what has to change."""
    if counter == LOW_VOLTAGE_EVENT:
        return "use a stronger supply or a shorter cable"
    if mode is None:
        return ADVICE
    return "power mode {} asks for too much, so name a lower one as power_mode; `jetway probe` lists them".format(
        mode
    )


def _alarms(before: Json, after: Json) -> List[str]:
    found = []
    new = new_lines(before["logged_alarms"] or [], after["logged_alarms"] or [])
    if new:
        text = (
            "the kernel logged {} over-current alarms, the last: {!r}. On a Nano it is mostly the 5 V supply"
        )
        found.append(text.format(len(new), new[-1]))
    if after["low_voltage_alarm"]:
        found.append("the supply voltage was too low: use a stronger supply or a shorter cable")
    return found


def new_lines(before: List[str], after: List[str]) -> List[str]:
    """Those of a log that were not there before; the log may have lost its oldest since."""
    if before and before[-1] in after:
        return after[after.index(before[-1]) + 1 :]
    return after


def _cooling(samples: Series) -> List[str]:
    found = []
    for name in sorted(samples.columns):
        values = samples.values(name) if name.startswith("cooling.") else []
        slowed = [value for value in values if value > 0]
        if slowed:
            text = "{} slowed the chip down in {:.0%} of the samples: {}"
            found.append(text.format(name[len("cooling.") :], len(slowed) / float(len(values)), ADVICE))
    return found


def _slow_gpu(samples: Series, limit: Optional[clocks.Limits]) -> List[str]:
    """Of a GPU that is locked, or that has enough to do for its governor to raise the clock."""
    if limit is None or not limit["max_mhz"]:
        return []
    loads = samples.columns.get("load_ratio.gpu") or [0.0] * len(samples.times)
    locked = clocks.is_locked(limit)
    busy = [
        clock
        for clock, load in zip(samples.columns.get("clock_mhz.gpu", ()), loads)
        if clock > 0 and (locked or load >= BUSY_RATIO)
    ]
    return _too_slow("the GPU", busy, limit["max_mhz"])


def _slow_cores(samples: Series, limits: Dict[str, clocks.Limits]) -> List[str]:
    """Of cores that are locked: others follow their load."""
    found = []
    for name in sorted(limits):
        if name != "gpu" and clocks.is_locked(limits[name]):
            found += _too_slow(name, samples.values("clock_mhz." + name), limits[name]["max_mhz"])
    return found


def _too_slow(name: str, values: List[float], max_mhz: float) -> List[str]:
    slow = [value for value in values if value < FULL_CLOCK_RATIO * max_mhz]
    if not values or len(slow) <= TOLERATED_RATIO * len(values):
        return []
    text = "the clock of {} fell to {:.0f} of {:.0f} MHz, in {:.0%} of the samples with work to do: {}"
    return [text.format(name, min(slow), max_mhz, len(slow) / float(len(values)), ADVICE)]


def _card_faults(samples: Series) -> List[str]:
    found = []
    for name, text in FAULTS.items():
        ratio = _ratio_with(samples, name)
        if ratio > 0:
            found.append("the GPU {} in {:.0%} of the samples".format(text, ratio))
    return found


def _ratio_with(samples: Series, reason: str) -> float:
    """Share of the samples in which this held the card's clocks back."""
    bits = [int(value) for value in samples.values("clock_limits.gpu")]
    return len([value for value in bits if value & nvml.REASONS[reason]]) / float(len(bits) or 1)
