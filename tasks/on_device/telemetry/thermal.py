"""What the kernel does to a machine that is hot or short of power: cooling devices and over-current counters."""

import re
import shutil
import subprocess
from typing import Dict, List, Optional

from jetway.tasks.on_device import machine

#: Cooling devices that slow the chip down. Fans, and alerts that slow nothing, are others.
SLOWING = re.compile(
    r"throttle-alert|^(?:thermal-)?(?:cpufreq|devfreq)-|^Processor$|^(?:cpu|gpu)[-_](?:balanced|heavy|critical)$"
)
#: The driver's counters, of which each board has some. The first is of the supply's voltage.
OVER_CURRENT_EVENTS = {
    "oc1": "the supply voltage was too low",
    "oc2": "the mean current was too high",
    "oc3": "the momentary current was too high",
}
#: The one whose cure is the supply. The others are cured by a mode that asks for less.
LOW_VOLTAGE_EVENT = "oc1"
#: What the kernel logs on boards without counters (JetPack 4 and 5: Nano and Xavier).
ALARM_LINE = re.compile(r"soctherm: OC ALARM (0x[0-9a-fA-F]+)")
DMESG_TIMEOUT_S = 10


class CoolingDevices:
    """Those that slow the chip down, found once and read often."""

    def __init__(self) -> None:
        self._folders = {}  # type: Dict[str, str]
        for folder in machine.system_files("/sys/class/thermal/cooling_device*"):
            kind = machine.read_text(folder + "/type")
            if kind is not None and SLOWING.search(kind):
                self._folders[self._free_name(kind)] = folder

    def _free_name(self, kind: str) -> str:
        """Cores of one kind have a device each."""
        same = [name for name in self._folders if name == kind or name.startswith(kind + " ")]
        return "{} {}".format(kind, len(same) + 1) if same else kind

    def read(self) -> Dict[str, Optional[float]]:
        """How hard each cools, by its name in a series; 0 is not at all."""
        return {
            "cooling." + name: machine.read_number(folder + "/cur_state")
            for name, folder in self._folders.items()
        }


def read() -> Dict[str, Optional[float]]:
    """Temperatures by their names in a series."""
    return {"temperature_c." + zone: value for zone, value in machine.temperatures_c().items()}


def event_counts() -> Dict[str, int]:
    """Times since boot that the power protection slowed the chip down, by counter; those that this board has."""
    found = {}
    for folder in machine.system_files("/sys/class/hwmon/hwmon*"):
        if machine.read_text(folder + "/name") == "soctherm_oc":
            for counter in OVER_CURRENT_EVENTS:
                count = machine.read_number("{}/{}_event_cnt".format(folder, counter))
                if count is not None:
                    found[counter] = count
    return found


def low_voltage_alarm() -> Optional[int]:
    """Whether a Raspberry Pi's firmware has seen its supply drop, 0 or 1; None elsewhere."""
    for folder in machine.system_files("/sys/class/hwmon/hwmon*"):
        if machine.read_text(folder + "/name") == "rpi_volt":
            return machine.read_number(folder + "/in0_lcrit_alarm")
    return None


def logged_alarms() -> Optional[List[str]]:
    """The kernel's log lines of over-current alarms; None where this user may not read the log."""
    if shutil.which("dmesg") is None:
        return None
    try:
        done = subprocess.run(
            ["dmesg"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=DMESG_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return [line for line in done.stdout.decode("utf-8", "replace").splitlines() if ALARM_LINE.search(line)]


def fan() -> Dict[str, int]:
    """Duty (0 to 255) and speed of the fan, where they can be read."""
    found = {}  # type: Dict[str, int]
    for folder in machine.system_files("/sys/class/hwmon/hwmon*"):
        for key, name in (("pwm", "pwm1"), ("rpm", "rpm"), ("rpm", "fan1_input")):
            value = machine.read_number("{}/{}".format(folder, name))
            if value is not None:
                found.setdefault(key, value)
    return found
