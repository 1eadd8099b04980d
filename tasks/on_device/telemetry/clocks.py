"""Clocks of GPU, CPU and memory, and the limits that they move in, through sysfs. In MHz."""

from typing import Any, Dict, List, Optional

from jetway.tasks.on_device import machine

#: Names in the device tree of a Jetson's GPU, Nano to Thor.
GPU_NODES = ("gm20b", "gp10b", "gv11b", "ga10b", "gb10b", "gpu")
#: A Thor's GPU has no node; its driver names the clock of the graphics clusters.
GPU_CLUSTER_CLOCKS = "/sys/class/devfreq/gpu-gpc-*"
#: Readable by root alone, in Hz.
EMC_RATES = (
    "/sys/kernel/debug/bpmp/debug/clk/emc/rate",
    "/sys/kernel/debug/clk/emc/clk_rate",
    "/sys/kernel/debug/clk/override.emc/clk_rate",
)

Limits = Dict[str, Any]


def gpu_folder() -> Optional[str]:
    """The devfreq folder of a Jetson's GPU: its name differs by board, so the device tree tells."""
    for folder in machine.system_files("/sys/class/devfreq/*"):
        if (machine.read_text(folder + "/device/of_node/name") or "") in GPU_NODES:
            return folder
    clusters = machine.system_files(GPU_CLUSTER_CLOCKS)
    return clusters[0] if clusters else None


def cpu_folders() -> Dict[str, str]:
    """cpufreq folders by core, of the cores that are on."""
    found = {}
    for folder in machine.system_files("/sys/devices/system/cpu/cpu[0-9]*/cpufreq"):
        found[folder.split("/")[-2]] = folder
    return found


def emc_path() -> Optional[str]:
    return next((path for path in EMC_RATES if machine.read_number(path) is not None), None)


def limits() -> Dict[str, Limits]:
    """What each clock may be: ``min_mhz``, ``max_mhz`` and ``governor`` of "gpu", "cpu0", and so on."""
    found = {}
    folder = gpu_folder()
    if folder is not None:
        found["gpu"] = _limits(folder, "min_freq", "max_freq", "governor", 1e6)
    for core, folder in cpu_folders().items():
        found[core] = _limits(folder, "scaling_min_freq", "scaling_max_freq", "scaling_governor", 1e3)
    return found


def _limits(folder: str, low: str, high: str, governor: str, divisor: float) -> Limits:
    return {
        "min_mhz": mhz(folder + "/" + low, divisor),
        "max_mhz": mhz(folder + "/" + high, divisor),
        "governor": machine.read_text(folder + "/" + governor),
    }


def mhz(path: str, divisor: float) -> Optional[float]:
    value = machine.read_number(path)
    return None if value is None else value / divisor


def is_locked(limit: Limits) -> bool:
    return limit["min_mhz"] is not None and limit["min_mhz"] == limit["max_mhz"]


def unlocked(found: Dict[str, Limits]) -> List[str]:
    """The clocks that may still move."""
    return sorted(name for name, limit in found.items() if not is_locked(limit))


class Clocks:
    """The clocks of this machine, found once and read often."""

    def __init__(self) -> None:
        self._gpu = gpu_folder()
        self._cpus = cpu_folders()
        self._emc = emc_path()

    def read(self) -> Dict[str, Optional[float]]:
        """By their names in a series."""
        found = {
            "clock_mhz." + core: mhz(folder + "/scaling_cur_freq", 1e3) for core, folder in self._cpus.items()
        }
        if self._gpu is not None:
            found["clock_mhz.gpu"] = mhz(self._gpu + "/cur_freq", 1e6)
            found["load_ratio.gpu"] = self._gpu_load_ratio(self._gpu)
        if self._emc is not None:
            found["clock_mhz.emc"] = mhz(self._emc, 1e6)
        return found

    def _gpu_load_ratio(self, folder: str) -> Optional[float]:
        permille = machine.read_number(folder + "/device/load")
        return None if permille is None else permille / 1000.0
