"""Power rails that the kernel measures: INA3221 and INA238 monitors, JetPack 5 and later (hwmon) and 4 (iio).

A reading is a transfer on a slow bus, about a millisecond, and the monitors average over some.
"""

from typing import Callable, Dict, List, Optional, Tuple

from jetway.tasks.on_device import machine

NOT_CONNECTED = ("NC", "")
#: What the driver of an INA3221 calls its seventh voltage, which is no rail's.
SHUNT_SUM = "sum of shunt voltages"
#: The rail of a monitor that has one channel and no name for it: a Thor's carrier board measures its input so.
UNNAMED = {"ina238": "VIN"}

HWMON_PATTERNS = ("/sys/class/hwmon/hwmon*", "/sys/bus/i2c/drivers/ina*/*/hwmon/hwmon*")
IIO_PATTERN = "/sys/bus/i2c/drivers/ina3221x/*/iio:device*"

Reading = Dict[str, float]


class Rail:
    """A rail: ``power_w`` and, where it is measured, ``voltage_v``."""

    def __init__(self, name: str, read: Callable[[], Reading]) -> None:
        self.name = name
        #: Empty where the monitor cannot be read just now.
        self.read = read


def find() -> List[Rail]:
    """The rails of this machine, each once."""
    found = {}  # type: Dict[str, Rail]
    for rail in _hwmon_rails() + _iio_rails():
        found.setdefault(rail.name, rail)
    return list(found.values())


def _hwmon_rails() -> List[Rail]:
    rails, seen = [], set()
    for pattern in HWMON_PATTERNS:
        for folder in machine.system_files(pattern):
            number = folder.rsplit("/", 1)[1]
            if number not in seen and (machine.read_text(folder + "/name") or "").startswith("ina"):
                seen.add(number)
                rails += _monitor_rails(folder)
    return rails


def _monitor_rails(folder: str) -> List[Rail]:
    """Of one monitor: a power that it multiplies itself, or voltage and current for each channel."""
    if machine.system_files(folder + "/power*_input"):
        return _measured_power(folder)
    rails = []
    for path in machine.system_files(folder + "/curr*_input"):
        channel = path[len(folder) + len("/curr") : -len("_input")]
        name = machine.read_text("{}/in{}_label".format(folder, channel))
        voltage = "{}/in{}_input".format(folder, channel)
        if name is not None and name not in NOT_CONNECTED and name != SHUNT_SUM:
            rails.append(Rail(name, _multiplied(voltage, path)))
    return rails


def _measured_power(folder: str) -> List[Rail]:
    rails = []
    for path in machine.system_files(folder + "/power*_input"):
        channel = path[len(folder) + len("/power") : -len("_input")]
        labels = ("{}/power{}_label".format(folder, channel), folder + "/label", folder + "/device/label")
        name = next((text for text in map(machine.read_text, labels) if text), None)
        name = name or UNNAMED.get(machine.read_text(folder + "/name") or "")
        if name is not None and name not in NOT_CONNECTED:
            rails.append(Rail(name, _microwatts(path, "{}/in{}_input".format(folder, channel))))
    return rails


def _iio_rails() -> List[Rail]:
    rails = []
    for folder in machine.system_files(IIO_PATTERN):
        for path in machine.system_files(folder + "/rail_name_*"):
            channel, name = path.rsplit("_", 1)[1], machine.read_text(path)
            if name is not None and name not in NOT_CONNECTED:
                power = "{}/in_power{}_input".format(folder, channel)
                voltage = "{}/in_voltage{}_input".format(folder, channel)
                rails.append(Rail(name, _milliwatts(power, voltage)))
    return rails


def _multiplied(voltage_path: str, current_path: str) -> Callable[[], Reading]:
    def read() -> Reading:
        millivolts, milliamperes = machine.read_number(voltage_path), machine.read_number(current_path)
        if millivolts is None or milliamperes is None:
            return {}
        return {"power_w": millivolts * milliamperes / 1e6, "voltage_v": millivolts / 1e3}

    return read


def _microwatts(power_path: str, voltage_path: str) -> Callable[[], Reading]:
    return lambda: _reading((power_path, 1e6), (voltage_path, 1e3))


def _milliwatts(power_path: str, voltage_path: str) -> Callable[[], Reading]:
    return lambda: _reading((power_path, 1e3), (voltage_path, 1e3))


def _reading(power: Tuple[str, float], voltage: Tuple[str, float]) -> Reading:
    values = {"power_w": _scaled(*power), "voltage_v": _scaled(*voltage)}
    return {key: value for key, value in values.items() if value is not None}


def _scaled(path: str, divisor: float) -> Optional[float]:
    value = machine.read_number(path)
    return None if value is None else value / divisor
