"""What the machine is, and how it is doing right now. A figure that cannot be read is None.

With the environment variable JETWAY_SIMULATED_ROOT set, the kernel's files are looked up under that folder: a machine
that is told so says ``simulated`` in its probe, its passports and its results.
"""

import glob
import os
import platform
import shutil
import socket
import sys
from typing import Any, Dict, List, Optional

SIMULATED_ROOT = "JETWAY_SIMULATED_ROOT"
# About this process, which is real on any machine.
OWN_PROCESS = ("/proc/self/", "/proc/thread-self/")
SENSOR_OFF_MILLIDEGREES = -256000
# Thermal zones that always say the same: the power chip of a Jetson.
NO_SENSORS = ("PMIC",)
# Names in /proc/cpuinfo, x86 then ARM, that decide which kernels an engine can use.
INSTRUCTION_SETS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)
# Those that multiply int8 and add into int32 in one step; without one, int8 is hardly faster than fp32.
INT8_INSTRUCTION_SETS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def simulated() -> bool:
    return bool(os.environ.get(SIMULATED_ROOT))


def system_path(path: str) -> str:
    """Where a file of /proc, /sys or /etc is to be read."""
    root = os.environ.get(SIMULATED_ROOT)
    if not root or path.startswith(OWN_PROCESS):
        return path
    return os.path.join(root, path.lstrip("/"))


def system_files(pattern: str) -> List[str]:
    """Paths of /proc, /sys or /etc that match, in order, as ``read_text`` takes them."""
    root = system_path("/")
    return sorted("/" + os.path.relpath(found, root) for found in glob.glob(system_path(pattern)))


def read_text(path: str) -> Optional[str]:
    """A small file of /proc, /sys or /etc, without the NUL bytes that device trees end in."""
    try:
        with open(system_path(path), "rb") as file:
            return file.read().decode("utf-8", "replace").strip("\0\n ")
    except OSError:
        return None


def read_number(path: str) -> Optional[int]:
    text = read_text(path)
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def cpu() -> Dict[str, Any]:
    """Model, architecture and instruction sets: what an engine built for this CPU depends on."""
    fields = _cpuinfo()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    found = [name for name in INSTRUCTION_SETS if name in flags]
    return {
        "model": fields.get("model name") or fields.get("Hardware") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "instruction_sets": found,
        "int8_instruction_sets": [name for name in found if name in INT8_INSTRUCTION_SETS],
    }


def _cpuinfo() -> Dict[str, str]:
    """Fields of the first processor."""
    fields = {}  # type: Dict[str, str]
    for line in (read_text("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_mib() -> Dict[str, Optional[float]]:
    """Memory in total, what can be had without swapping, and free swap."""
    lines = (read_text("/proc/meminfo") or "").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if ":" in line}
    return {
        "total": _mib(kib.get("MemTotal"), 1024),
        "available": _mib(kib.get("MemAvailable"), 1024),
        "swap_free": _mib(kib.get("SwapFree"), 1024),
    }


def process_memory_mib() -> Dict[str, Optional[float]]:
    """Resident memory of this process: now, and at its peak."""
    lines = (read_text("/proc/self/status") or "").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": _mib(kib.get("VmRSS"), 1024), "peak": _mib(kib.get("VmHWM"), 1024)}


def free_disk_mib(folder: str) -> float:
    """Free disk for a user at ``folder``, or at the nearest parent that exists."""
    folder = os.path.abspath(os.path.expanduser(folder))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free / 2.0**20


def _mib(count: Optional[int], unit_bytes: int) -> Optional[float]:
    return None if count is None else round(count * unit_bytes / 2.0**20, 1)


def operating_system() -> str:
    for line in (read_text("/etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return platform.platform()


def board() -> Optional[str]:
    """Name of an embedded board, such as a Jetson's."""
    return read_text("/proc/device-tree/model")


def l4t_release() -> Optional[str]:
    """First line of NVIDIA's release file on a Jetson."""
    text = read_text("/etc/nv_tegra_release")
    return text.splitlines()[0] if text else None


def frequencies_mhz() -> Dict[str, Any]:
    """Clock and governor of each core, where the kernel tells."""
    folder = "/sys/devices/system/cpu/cpu{}/cpufreq/{}"
    clocks = [read_number(folder.format(core, "scaling_cur_freq")) for core in range(os.cpu_count() or 1)]
    governors = {read_text(folder.format(core, "scaling_governor")) for core in range(os.cpu_count() or 1)}
    return {
        "current": [None if khz is None else khz / 1000.0 for khz in clocks],
        "governors": sorted(name for name in governors if name),
    }


def snapshot() -> Dict[str, Any]:
    """How busy, fast and hot the machine is: taken before and after a session."""
    return {
        "load_average": list(os.getloadavg()),
        "frequencies_mhz": frequencies_mhz(),
        "throttle_events": throttle_events(),
        "stolen_ms": stolen_ms(),
        "temperatures_c": temperatures_c(),
        "memory_available_mib": memory_mib()["available"],
    }


def throttle_events() -> Optional[int]:
    """Times that a core slowed down because it was hot, since boot."""
    pattern = "/sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"
    counts = [read_number(path) for path in system_files(pattern)]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def stolen_ms() -> Optional[float]:
    """Time that a hypervisor gave to others while we had work, since boot, over all cores."""
    fields = ((read_text("/proc/stat") or "").splitlines() or [""])[0].split()
    return int(fields[8]) * 1000.0 / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else None


def waited_for_cpu_ns() -> int:
    """Time that this thread was ready while another had its core; 0 where the kernel does not count it."""
    fields = (read_text("/proc/thread-self/schedstat") or "").split()
    return int(fields[1]) if len(fields) > 1 else 0


def temperatures_c() -> Dict[str, float]:
    """By zone. A zone whose part of the chip has no power cannot be read, or says -256 degrees."""
    found = {}
    for zone in system_files("/sys/class/thermal/thermal_zone*"):
        millidegrees = read_number(zone + "/temp")
        kind = read_text(zone + "/type") or os.path.basename(zone)
        if (
            millidegrees is not None
            and millidegrees > SENSOR_OFF_MILLIDEGREES
            and not kind.startswith(NO_SENSORS)
        ):
            found[kind] = millidegrees / 1000.0
    return found


def identity() -> Dict[str, Any]:
    """Who the machine is, in the probe's words."""
    return {
        "hostname": socket.gethostname(),
        "os": operating_system(),
        "kernel": platform.release(),
        "python": "{}.{}.{}".format(*sys.version_info[:3]),
        "board": board(),
        "l4t": l4t_release(),
    }
