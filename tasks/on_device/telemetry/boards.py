"""What the names that a Jetson uses mean: its power rails, its module, its L4T release."""

import re
from typing import Dict, Iterable, Optional, Tuple

from jetway.tasks.on_device import machine

#: Rails that measure all there is; the first that a board has counts. VDD_IN is the module of a Nano, NX or TX2,
#: POM_5V_IN the board of the first Nano, VIN the board of a Thor.
TOTAL_RAILS = ("VIN", "VDD_IN", "POM_5V_IN")
#: The total of a board that measures none (AGX Xavier, AGX Orin): the module without what no monitor sees.
SUM_OF_RAILS = "sum_of_rails"
#: A rail that another one feeds: its power is in the other's already. The memory of an AGX Orin hangs on its 5 V, whose
#: voltage its monitor shows; no document of NVIDIA's was at hand to confirm it.
FED_BY = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}

#: By the module's part number, which is in the device tree's ``compatible``.
MODULES = {
    "p2180": "Jetson TX1",
    "p3310": "Jetson TX2",
    "p2771": "Jetson TX2",
    "p3489": "Jetson TX2i",
    "p3636": "Jetson TX2 NX",
    "p3448": "Jetson Nano",
    "p2888": "Jetson AGX Xavier",
    "p3668": "Jetson Xavier NX",
    "p3701-0000": "Jetson AGX Orin",
    "p3701-0002": "Jetson AGX Orin",
    "p3701-0004": "Jetson AGX Orin 32GB",
    "p3701-0005": "Jetson AGX Orin 64GB",
    "p3701-0008": "Jetson AGX Orin Industrial",
    "p3767-0000": "Jetson Orin NX 16GB",
    "p3767-0001": "Jetson Orin NX 8GB",
    "p3767-0003": "Jetson Orin Nano 8GB",
    "p3767-0004": "Jetson Orin Nano 4GB",
    "p3767-0005": "Jetson Orin Nano 8GB",
    "p3834": "Jetson AGX Thor",
}

#: JetPack by the L4T release that it brings.
JETPACKS = {
    "32.4.3": "4.4",
    "32.4.4": "4.4.1",
    "32.5.0": "4.5",
    "32.5.1": "4.5.1",
    "32.5.2": "4.5.1",
    "32.6.1": "4.6",
    "32.7.1": "4.6.1",
    "32.7.2": "4.6.2",
    "32.7.3": "4.6.3",
    "32.7.4": "4.6.4",
    "32.7.5": "4.6.5",
    "32.7.6": "4.6.6",
    "34.1.0": "5.0",
    "34.1.1": "5.0.1",
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "35.6.2": "5.1.5",
    "36.2.0": "6.0",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
}
#: What is known of a release that the table lacks.
JETPACK_FAMILIES = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7", "39": "7"}


def total_power(rails: Iterable[str]) -> Tuple[Optional[str], Tuple[str, ...]]:
    """The name of the board's total power, and the rails that make it up, none of them twice.

    The name is a rail's, or ``sum_of_rails`` where the board has no monitor for the whole; None without any rail.
    """
    names = tuple(rails)
    for total in TOTAL_RAILS:
        if total in names:
            return total, (total,)
    counted = tuple(name for name in names if FED_BY.get(name) not in names)
    return (SUM_OF_RAILS, counted) if counted else (None, ())


def module() -> Optional[str]:
    """The module on the board, such as "Jetson Orin NX 16GB"; None where the device tree names none."""
    names = (machine.read_text("/proc/device-tree/compatible") or "").split("\0")
    for part in (part for name in names for part in re.findall(r"p\d{4}(?:-\d{4})?", name)):
        known = MODULES.get(part) or MODULES.get(part[:5])
        if known:
            return known
    return None


def l4t_version() -> Optional[str]:
    """The release of Jetson Linux, such as "36.4.4"."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", machine.l4t_release() or "")
    return "{}.{}".format(*found.groups()) if found else None


def jetpack() -> Optional[str]:
    """The JetPack that brought this L4T: "6.2.1", or "6" for a release that is not known here."""
    version = l4t_version()
    if version is None:
        return None
    return JETPACKS.get(version) or JETPACK_FAMILIES.get(version.split(".")[0])


def facts() -> Dict[str, Optional[str]]:
    """For the probe."""
    return {"module": module(), "l4t_version": l4t_version(), "jetpack": jetpack()}
