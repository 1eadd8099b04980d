"""The state that a target is in, as its verb ``checkup`` tells it, judged line by line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jetway.configs.schema import Target
from jetway.tasks.checks import Check, judged, skipped
from jetway.tasks.contract import contract_of
from jetway.tasks.target_info import TargetInfo

#: Sensors that every machine has: one alone is no telemetry.
MEMORY_COLUMN = "memory_used_mib"
#: The counter of a Jetson's power protection that is about the supply; the others are about what it is asked for.
LOW_VOLTAGE_COUNTER = "oc1"


def state_checks(target: Target, info: TargetInfo, state: Mapping[str, Any]) -> Iterator[Check]:
    """What the verb ``checkup`` said of the machine's state."""
    yield lease_check(state["lease"])
    yield room_check("disk", state["free_disk_mib"], target.min_free_disk_mib)
    yield room_check("memory", state["memory_mib"]["available"], target.min_free_memory_mib)
    yield clocks_check(state)
    yield power_mode_check(state["power"])
    yield supply_check(state)
    yield rails_check(info, state)
    yield sensors_check(state)


def simulated_checks(info: TargetInfo) -> Iterator[Check]:
    """A line for a target that is none."""
    if info.is_simulated:
        yield skipped("real device", "this target is SIMULATED: its figures say nothing of a real one")


def lease_check(lease: Mapping[str, Any]) -> Check:
    if lease["problem"]:
        return judged("lease", False, lease["problem"])
    holder = lease["holder"]
    evidence = f"held by another job since {holder.get('since')}" if holder else "the accelerator is free"
    return judged("lease", True, evidence)


def room_check(name: str, free_mib: float | None, asked_mib: float) -> Check:
    """Of disk or memory, against what the target file asks for."""
    if free_mib is None:
        return skipped(name, "the kernel does not tell")
    evidence = f"{free_mib:.0f} MiB free, {asked_mib:.0f} asked for (min_free_{name}_mib)"
    return judged(name, free_mib >= asked_mib, evidence, free_mib=free_mib, asked_mib=asked_mib)


def clocks_check(state: Mapping[str, Any]) -> Check:
    clocks = _columns(state, "clock_mhz.")
    if not clocks:
        return skipped("clocks", "the kernel tells no clocks, as in virtual machines")
    governors = ", ".join(state["frequencies_mhz"]["governors"]) or "none told"
    parts = ", ".join(f"{name} {mhz:.0f} MHz" for name, mhz in clocks.items())
    return judged("clocks", True, f"{parts}; governors: {governors}", **clocks)


def power_mode_check(power: Mapping[str, Any], measured_in: str | None = None) -> Check:
    """Whether the mode that is set can be read, by the name that a recipe would give, and is the measurement's."""
    modes, mode = power["power_modes"], power["power_mode"]
    if not modes and mode is None:
        return skipped("power mode", "this machine has no nvpmodel")
    evidence = f"{mode or 'the one that is set cannot be read'}, of {', '.join(modes)}"
    if measured_in not in (None, mode):
        evidence += (
            f"; its figures were measured in {measured_in}, which is set for a measurement alone. Set it for good with "
            "nvpmodel, or measure in the mode that the board works in (power_mode)"
        )
    return judged("power mode", mode in modes and measured_in in (None, mode), evidence, power_mode=mode)


def supply_check(state: Mapping[str, Any]) -> Check:
    """Whether the supply was too weak since boot. Short bursts of current are none of its faults, and are told."""
    events, alarm = state["over_current_events"], state["low_voltage_alarm"]
    if not events and alarm is None:
        return skipped("power supply", "this board counts neither low voltage nor over-current")
    weak = bool(events.get(LOW_VOLTAGE_COUNTER) or alarm)
    told = ", ".join(f"{name} {count}" for name, count in events.items()) or f"low voltage alarm {alarm}"
    advice = (
        ": the voltage was too low. Use a stronger supply or a shorter cable, and boot again" if weak else ""
    )
    return judged("power supply", not weak, f"events since boot: {told}{advice}", **events)


def rails_check(info: TargetInfo, state: Mapping[str, Any]) -> Check:
    """The rails that can be read, against those that the board is known to have."""
    rails = _columns(state, "power_w.")
    board = contract_of(info).board
    missing = [name for name in (board.rails if board else ()) if name not in rails]
    if board and missing:
        return judged(
            "power rails",
            False,
            f"{board.name} has {', '.join(board.rails)}, and {', '.join(missing)} cannot be read. Look for the "
            "monitors under /sys/class/hwmon, and whether this user may read them.",
        )
    if not rails:
        return skipped("power rails", "this machine measures no power that Jetway can read")
    parts = ", ".join(f"{name} {watts:.2f} W" for name, watts in rails.items())
    return judged("power rails", True, f"{parts}; all there is: {state['power_total']}", **rails)


def sensors_check(state: Mapping[str, Any]) -> Check:
    read = {name: value for name, value in state["sensors"].items() if value is not None}
    told = [f"{name} {value:.4g}" for name, value in read.items() if name != MEMORY_COLUMN]
    if not told:
        return skipped("telemetry", f"no sensors beside memory ({read.get(MEMORY_COLUMN, 0):.0f} MiB used)")
    return judged("telemetry", True, f"{len(read)} sensors: {', '.join(told)}", **read)


def _columns(state: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): value
        for name, value in state["sensors"].items()
        if name.startswith(prefix) and value is not None
    }
