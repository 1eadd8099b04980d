"""NVIDIA's management library through ctypes: what a GPU draws, how warm and fast it is, and what holds it back.

A figure that a device does not have (NOT_SUPPORTED; on Jetsons that is most of them) is None.
"""

import ctypes
import os
from typing import Any, Dict, Iterator, List, Optional

#: Names a library that is none of the usual ones.
PATH_VARIABLE = "JETWAY_LIBNVML"
SONAMES = ("libnvidia-ml.so.1", "libnvidia-ml.so")
TEXT_BYTES = 96

SUCCESS = 0
TEMPERATURE_GPU = 0
CLOCK_SM, CLOCK_MEMORY = 1, 2

# Bits of what holds the clocks back, the same under both names of the function.
REASONS = {
    "idle": 0x1,
    "application_clocks": 0x2,
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake": 0x80,
    "display_clocks": 0x100,
}
REASON_FUNCTIONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")


class NvmlError(Exception):
    """The library is absent, does not start, or has no such device. The message says which."""


class Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class Utilization(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("gpu", "memory")]


class PciInfo(ctypes.Structure):
    """Of nvmlDeviceGetPciInfo_v3; ``bus_id`` has eight digits of domain."""

    _fields_ = [
        ("bus_id_legacy", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("device_id", ctypes.c_uint),
        ("subsystem_id", ctypes.c_uint),
        ("bus_id", ctypes.c_char * 32),
    ]


class Device:
    """One GPU: the one with this PCI bus id or UUID, or the first."""

    def __init__(self, which: Optional[str] = None, path: Optional[str] = None) -> None:
        self._library = _load(path)
        self._start()
        self._handle = self._find(which)

    def _start(self) -> None:
        status = self._library.nvmlInit_v2()
        if status != SUCCESS:
            raise NvmlError("NVML does not start: {}.".format(self._error_text(status)))

    def _error_text(self, status: int) -> str:
        describe = self._library.nvmlErrorString
        describe.restype = ctypes.c_char_p
        return (describe(status) or b"").decode("utf-8", "replace") or "error {}".format(status)

    def _find(self, which: Optional[str]) -> ctypes.c_void_p:
        handles = self._handles()
        for handle in handles:
            self._handle = handle
            if which is None or which.lower() in ((self.uuid() or "").lower(), self.pci_bus_id()):
                return handle
        raise NvmlError("NVML has {} GPUs, and none is {}.".format(len(handles), which or "usable"))

    def _handles(self) -> List[ctypes.c_void_p]:
        count = ctypes.c_uint()
        self._library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        handles = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if self._library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == SUCCESS:
                handles.append(handle)
        return handles

    def _get(self, name: str, value: Any, *arguments: int) -> Any:
        """``value`` filled in by the function, or None where the device or the library does not have it."""
        function = getattr(self._library, name, None)
        if function is None:
            return None
        status = function(self._handle, *(list(arguments) + [ctypes.byref(value)]))
        return value if status == SUCCESS else None

    def _number(self, name: str, *arguments: int) -> Optional[int]:
        found = self._get(name, ctypes.c_uint(), *arguments)
        return None if found is None else int(found.value)

    def _long(self, name: str) -> Optional[int]:
        found = self._get(name, ctypes.c_ulonglong())
        return None if found is None else int(found.value)

    def _text(self, name: str) -> Optional[str]:
        text = ctypes.create_string_buffer(TEXT_BYTES)
        status = getattr(self._library, name)(self._handle, text, TEXT_BYTES)
        return text.value.decode("utf-8", "replace") if status == SUCCESS else None

    def name(self) -> Optional[str]:
        return self._text("nvmlDeviceGetName")

    def uuid(self) -> Optional[str]:
        return self._text("nvmlDeviceGetUUID")

    def pci_bus_id(self) -> Optional[str]:
        """As CUDA writes it: four digits of domain, lower case."""
        found = self._get("nvmlDeviceGetPciInfo_v3", PciInfo())
        return None if found is None else found.bus_id.decode("ascii").lower()[-len("0000:00:00.0") :]

    def power_w(self) -> Optional[float]:
        """Of the whole card; recent architectures average over a second."""
        return _divided(self._number("nvmlDeviceGetPowerUsage"), 1e3)

    def energy_j(self) -> Optional[float]:
        """Since the driver was loaded."""
        return _divided(self._long("nvmlDeviceGetTotalEnergyConsumption"), 1e3)

    def power_limit_w(self) -> Optional[float]:
        return _divided(self._number("nvmlDeviceGetEnforcedPowerLimit"), 1e3)

    def temperature_c(self) -> Optional[int]:
        return self._number("nvmlDeviceGetTemperature", TEMPERATURE_GPU)

    def clock_mhz(self) -> Optional[int]:
        """Of the multiprocessors."""
        return self._number("nvmlDeviceGetClockInfo", CLOCK_SM)

    def memory_clock_mhz(self) -> Optional[int]:
        return self._number("nvmlDeviceGetClockInfo", CLOCK_MEMORY)

    def max_clock_mhz(self) -> Optional[int]:
        return self._number("nvmlDeviceGetMaxClockInfo", CLOCK_SM)

    def memory_used_mib(self) -> Optional[float]:
        found = self._get("nvmlDeviceGetMemoryInfo", Memory())
        return None if found is None else found.used / 2.0**20

    def load_ratio(self) -> Optional[float]:
        """Share of the last sample period in which a kernel ran."""
        found = self._get("nvmlDeviceGetUtilizationRates", Utilization())
        return None if found is None else found.gpu / 100.0

    def reason_bits(self) -> Optional[int]:
        """What holds the clocks back now; ``reasons_of`` names them."""
        for name in REASON_FUNCTIONS:
            bits = self._long(name)
            if bits is not None:
                return bits
        return None

    def read(self) -> Dict[str, Optional[float]]:
        """The figures that change, by their names in a series; power is apart."""
        return {
            "temperature_c.gpu": self.temperature_c(),
            "clock_mhz.gpu": self.clock_mhz(),
            "clock_mhz.gpu_memory": self.memory_clock_mhz(),
            "memory_used_mib.gpu": self.memory_used_mib(),
            "load_ratio.gpu": self.load_ratio(),
            "clock_limits.gpu": self.reason_bits(),
        }

    def read_power(self) -> Dict[str, Optional[float]]:
        return {"power_w.gpu": self.power_w(), "energy_j.gpu": self.energy_j()}

    def facts(self) -> Dict[str, Any]:
        """What stays the same."""
        return {
            "name": self.name(),
            "uuid": self.uuid(),
            "pci_bus_id": self.pci_bus_id(),
            "power_limit_w": self.power_limit_w(),
            "max_clock_mhz": self.max_clock_mhz(),
            "measures_power": self.power_w() is not None,
            "counts_energy": self.energy_j() is not None,
        }

    def close(self) -> None:
        self._library.nvmlShutdown()


def reasons_of(bits: int) -> List[str]:
    return [name for name, bit in REASONS.items() if bits & bit]


def open_device(which: Optional[str] = None) -> Optional[Device]:
    """The GPU, as ``Device`` finds it, or None on a machine without NVML or without that GPU."""
    try:
        return Device(which)
    except NvmlError:
        return None


def _divided(value: Optional[int], divisor: float) -> Optional[float]:
    return None if value is None else value / divisor


def _load(path: Optional[str]) -> Any:
    failures = []
    for name in _candidates(path):
        try:
            return ctypes.CDLL(name)
        except OSError as exc:
            failures.append(str(exc))
    raise NvmlError("NVML cannot be loaded: {}.".format("; ".join(failures)))


def _candidates(path: Optional[str]) -> Iterator[str]:
    named = path or os.environ.get(PATH_VARIABLE)
    if named:
        yield named
        return
    for name in SONAMES:
        yield name
