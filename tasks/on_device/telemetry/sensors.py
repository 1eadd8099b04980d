"""All that this machine can be asked while it works, in one reading."""

from typing import Any, Dict, List, Optional

from jetway.tasks.on_device import machine
from jetway.tasks.on_device.telemetry import boards, clocks, nvml, rails, tegrastats, thermal

Reading = Dict[str, Optional[float]]
Values = Dict[str, float]

#: The total of a machine that measures no rails: the graphics card.
GPU = "gpu"
FIRST_GPU = "first"
SHORTEST_TEGRASTATS_MS = 100


class Sensors:
    """Found once, read often. Names in a reading are figure, unit, a dot, and what it is of: ``power_w.VDD_IN``.

    ``gpu`` is a graphics card's PCI bus id or UUID, ``FIRST_GPU``, or None where no card is part of what is measured.
    ``interval_ms`` is how often ``power``, if that is wanted, is to be new.
    """

    def __init__(self, gpu: Optional[str] = None, power: bool = True, interval_ms: int = 1000) -> None:
        self._clocks = clocks.Clocks()
        self._cooling = thermal.CoolingDevices()
        self._gpu = nvml.open_device(None if gpu == FIRST_GPU else gpu) if gpu else None
        self._power = Power(self._gpu, interval_ms) if power else None

    def read(self) -> Values:
        """What could be read just now. What two sources tell is taken from the kernel's files."""
        parts = [self._power.read()] if self._power else []
        parts += [self._gpu.read()] if self._gpu else []
        parts += [
            self._clocks.read(),
            self._cooling.read(),
            thermal.read(),
            {"memory_used_mib": memory_used_mib()},
        ]
        return {name: value for part in parts for name, value in part.items() if value is not None}

    def close(self) -> None:
        if self._power:
            self._power.close()
        if self._gpu:
            self._gpu.close()


class Power:
    """Power by rail and card, and the sum of the rails that count where none of them is the total.

    With it comes what tegrastats alone can tell a user who is not root, such as the memory's clock.
    """

    def __init__(self, gpu: Optional[nvml.Device], interval_ms: int) -> None:
        self._gpu = gpu
        self._rails = rails.find()
        self._tegrastats = None  # type: Optional[tegrastats.Tegrastats]
        self._last_line = {}  # type: Dict[str, Any]
        if tegrastats.is_here():
            self._tegrastats = tegrastats.Tegrastats(max(interval_ms, SHORTEST_TEGRASTATS_MS))

    def read(self) -> Reading:
        found = self._gpu.read_power() if self._gpu else {}  # type: Reading
        found.update(self._read_tegrastats())
        for rail in self._rails:
            found.update({"{}.{}".format(key, rail.name): value for key, value in rail.read().items()})
        found.update(self._sum([rail.name for rail in self._rails] or rails_of(found), found))
        return found

    def _read_tegrastats(self) -> Reading:
        """Its newest line. Its rails are those of a board whose monitors this user cannot read."""
        if self._tegrastats is not None:
            for line in self._tegrastats.lines()[-1:]:
                self._last_line = line
        found = tegrastats.reading_of(self._last_line)
        return {
            name: value for name, value in found.items() if not (self._rails and name.startswith("power_w."))
        }

    def _sum(self, names: List[str], found: Reading) -> Reading:
        """Of the rails of a board that has no total; none while one of them cannot be read."""
        total, counted = boards.total_power(names)
        watts = [found.get("power_w." + name) for name in counted]
        known = [value for value in watts if value is not None]
        return {"power_w." + total: sum(known)} if total == boards.SUM_OF_RAILS and known == watts else {}

    def close(self) -> None:
        if self._tegrastats:
            self._tegrastats.close()


def facts() -> Dict[str, Any]:
    """For the probe: the rails, what the power of the whole is read from, and the first graphics card."""
    names, card = [rail.name for rail in rails.find()], nvml.open_device()
    told = card.facts() if card else None
    total, counted = boards.total_power(names)
    return {
        "rails": names,
        "counted_rails": list(counted),
        "total": total or (GPU if told and told["measures_power"] else None),
        "tegrastats": tegrastats.is_here(),
        "card": told,
    }


def rails_of(columns: Any) -> List[str]:
    """The board's rails among the names of a reading."""
    names = [name[len("power_w.") :] for name in columns if name.startswith("power_w.")]
    return [name for name in names if name not in (GPU, boards.SUM_OF_RAILS)]


def total_of(columns: Any) -> Optional[str]:
    """What measures the power of the whole: a rail, ``sum_of_rails``, the ``gpu``'s card, or nothing."""
    total, _ = boards.total_power(rails_of(columns))
    return total or (GPU if "power_w." + GPU in columns else None)


def memory_used_mib() -> Optional[float]:
    known = machine.memory_mib()
    if known["total"] is None or known["available"] is None:
        return None
    return known["total"] - known["available"]
