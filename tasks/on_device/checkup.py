"""Verb ``checkup``: the state that a machine is in, for the host to judge. What cannot be read is None or empty."""

from typing import Any, Callable, Dict, Optional

from jetway.tasks.on_device import lease, machine, power_mode, trtexec
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.telemetry import sensors, thermal

Json = Dict[str, Any]


def run(request: Json, progress: Callable[[Json], None]) -> Json:
    """``engine`` of the request names the lease to look at; ``work_dir`` is the folder whose free disk counts.

    Memory and disk are in MiB. ``sensors`` has one reading of each, by the names that telemetry uses.
    """
    source = sensors.Sensors(gpu=card_of(request["engine"]))
    try:
        reading = source.read()
    finally:
        source.close()
    return {
        "lease": lease_state(request["engine"]),
        "free_disk_mib": round(machine.free_disk_mib(request["work_dir"]), 1),
        "memory_mib": machine.memory_mib(),
        "frequencies_mhz": machine.frequencies_mhz(),
        "throttle_events": machine.throttle_events(),
        "over_current_events": thermal.event_counts(),
        "low_voltage_alarm": thermal.low_voltage_alarm(),
        "power": power_mode.facts(),
        "sensors": reading,
        "power_total": sensors.total_of(reading),
        "cameras": cameras(),
        "simulated": machine.simulated(),
    }


def card_of(engine: str) -> Optional[str]:
    """The graphics card among the sensors: the first, where the engine runs on a GPU."""
    return sensors.FIRST_GPU if lease.accelerator_id(engine) != lease.accelerator_id("onnxruntime") else None


def lease_state(engine: str) -> Json:
    """Whether the accelerator can be leased, and who holds it now."""
    try:
        path = lease.lease_path(lease.accelerator_id(engine), lease.directory())
        return {"problem": "", "holder": lease.read_holder(path)}
    except (DeviceError, OSError) as exc:
        return {"problem": str(exc), "holder": None}


def cameras() -> Any:
    """Names of the video devices that the kernel knows."""
    names = map(machine.read_text, machine.system_files("/sys/class/video4linux/*/name"))
    return sorted({name for name in names if name})


def trtexec_path() -> Optional[str]:
    """For the probe."""
    try:
        return trtexec.find()
    except DeviceError:
        return None
