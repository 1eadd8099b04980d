"""Lines of a Jetson's ``tegrastats``, JetPack 4 to 7.2, and the program itself.

A line is a row of fields without a common form, and each JetPack has added its own. So every field has a pattern, the
first that fits where the last one ended is taken, and a word that none fits is kept as ``unknown``, not dropped.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
from typing import Any, Callable, Dict, List, Match, Optional, Pattern

PR_SET_PDEATHSIG = 1
#: What the program prints for a sensor whose part of the chip has no power.
SENSOR_OFF_C = -256.0
#: The name of a power monitor's channel that nothing is connected to.
NOT_CONNECTED = "NC"

Json = Dict[str, Any]
Handler = Callable[[Json, Match[str]], None]

NUMBER = r"-?\d+(?:\.\d+)?"
CORE = r"(?:off|\d+%(?:@\d+)?)"
LOAD = r"(?:(\d+)%)?(?:@\[?([\d,]+)\]?)?"


def parse(line: str) -> Json:
    """The fields of a line, those that it has.

    ``time`` (the machine's clock), ``ram``, ``swap`` and ``iram`` (``used``, ``total`` and the largest free block,
    with units in the keys), ``cpu`` (per core ``load_percent`` and ``mhz``, None for one that is off), ``emc``, ``gpu``
    and ``gpu2`` (``load_percent``, ``mhz`` by graphics cluster), ``engines`` by name (None where off), ``mts``,
    ``temperatures_c`` (None where the sensor is off) and ``peak_temperatures_c``, ``rails`` (``now_mw``, ``mean_mw``
    since the program started, ``peak_mw``), ``unconnected_rails``, and ``unknown`` words.
    """
    found = {"unknown": []}  # type: Json
    position, line = 0, line.strip()
    while position < len(line):
        position = _take_field(found, line, position)
    return found


def _take_field(found: Json, line: str, position: int) -> int:
    """Reads one field into ``found``; returns where the next one begins."""
    for pattern, handle in FIELDS:
        match = pattern.match(line, position)
        if match:
            handle(found, match)
            return int(match.end())
    word = line[position:].split(None, 1)[0]
    found["unknown"].append(word)
    return _skip_spaces(line, position + len(word))


def _skip_spaces(line: str, position: int) -> int:
    while position < len(line) and line[position].isspace():
        position += 1
    return position


def _time(found: Json, match: Match[str]) -> None:
    found["time"] = match.group(1)


def _ram(found: Json, match: Match[str]) -> None:
    used, total, blocks, block = (int(text) for text in match.groups())
    found["ram"] = {"used_mib": used, "total_mib": total, "free_blocks": blocks, "free_block_mib": block}


def _swap(found: Json, match: Match[str]) -> None:
    used, total, cached = (int(text) for text in match.groups())
    found["swap"] = {"used_mib": used, "total_mib": total, "cached_mib": cached}


def _iram(found: Json, match: Match[str]) -> None:
    used, total, free = (int(text) for text in match.groups())
    found["iram"] = {"used_kib": used, "total_kib": total, "free_block_kib": free}


def _cpu(found: Json, match: Match[str]) -> None:
    found["cpu"] = [_core(text) for text in match.group(1).split(",")]


def _core(text: str) -> Optional[Dict[str, int]]:
    if text == "off":
        return None
    load, _, mhz = text.replace("%", "").partition("@")
    return {"load_percent": int(load), "mhz": int(mhz)} if mhz else {"load_percent": int(load)}


def _load_of(key: str) -> Handler:
    def handle(found: Json, match: Match[str]) -> None:
        found[key] = _load(match.group(1), match.group(2))

    return handle


def _load(percent: Optional[str], clocks: Optional[str]) -> Json:
    value = {}  # type: Json
    if percent is not None:
        value["load_percent"] = int(percent)
    if clocks is not None:
        value["mhz"] = [int(clock) for clock in clocks.split(",")]
    return value


def _engine(found: Json, match: Match[str]) -> None:
    name, off, percent, clocks, plain = match.groups()
    value = None if off else _load(percent, clocks or plain)
    found.setdefault("engines", {})[name.replace("_FREQ", "")] = value


def _mts(found: Json, match: Match[str]) -> None:
    found["mts"] = {"foreground_percent": int(match.group(1)), "background_percent": int(match.group(2))}


def _temperature(found: Json, match: Match[str]) -> None:
    name, now, peak = match.group(1), float(match.group(2)), match.group(3)
    found.setdefault("temperatures_c", {})[name] = None if now == SENSOR_OFF_C else now
    if peak is not None:
        found.setdefault("peak_temperatures_c", {})[name] = float(peak)


def _rail(found: Json, match: Match[str]) -> None:
    name, values = match.group(1), [int(text) for text in match.groups()[1:] if text is not None]
    if name == NOT_CONNECTED:
        found["unconnected_rails"] = found.get("unconnected_rails", 0) + 1
        return
    found.setdefault("rails", {})[name] = dict(zip(("now_mw", "mean_mw", "peak_mw"), values))


def _pattern(text: str) -> Pattern[str]:
    """Of a whole field: what follows is a space or the end."""
    return re.compile(text + r"(?:\s+|$)")


# In order: an engine's pattern would fit a rail's name, and a rail's the time.
FIELDS = [
    (_pattern(r"(\d\d-\d\d-\d{4} \d\d:\d\d:\d\d)"), _time),
    (_pattern(r"RAM (\d+)/(\d+)MB \(lfb (\d+)x(\d+)MB\)"), _ram),
    (_pattern(r"SWAP (\d+)/(\d+)MB \(cached (\d+)MB\)"), _swap),
    (_pattern(r"IRAM (\d+)/(\d+)kB ?\(lfb (\d+)kB\)"), _iram),
    (_pattern(r"CPU \[({0}(?:,{0})*)\]".format(CORE)), _cpu),
    (_pattern(r"EMC_FREQ " + LOAD), _load_of("emc")),
    (_pattern(r"GR3D_FREQ " + LOAD), _load_of("gpu")),
    (_pattern(r"GR3D2_FREQ " + LOAD), _load_of("gpu2")),
    (_pattern(r"MTS fg (\d+)% bg (\d+)%"), _mts),
    (_pattern(r"(\S+)@({0})C(?:/({0})C)?".format(NUMBER)), _temperature),
    (_pattern(r"(\S+) (\d+)(?:mW)?/(\d+)(?:mW)?(?:/(\d+)(?:mW)?)?"), _rail),
    (_pattern(r"([A-Z][A-Z0-9_]*) (?:(off)|(\d+)%(?:@\[?([\d,]+)\]?)?|@?\[?([\d,]+)\]?)"), _engine),
]  # type: List[Any]


def reading_of(line: Json) -> Dict[str, Optional[float]]:
    """The figures of a parsed line that a series has, by their names there."""
    found = {"power_w." + name: rail["now_mw"] / 1000.0 for name, rail in line.get("rails", {}).items()}
    for name in ("emc", "gpu"):
        part = line.get(name, {})
        if "load_percent" in part:
            found["load_ratio." + name] = part["load_percent"] / 100.0
        if "mhz" in part:
            found["clock_mhz." + name] = float(max(part["mhz"]))
    return dict(found)


def is_here() -> bool:
    return shutil.which("tegrastats") is not None


class Tegrastats:
    """The program, running. It ends with this object, and with this process however that ends."""

    def __init__(self, interval_ms: int) -> None:
        command = ["tegrastats", "--interval", str(interval_ms)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=_end_with_parent
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._rest = b""

    def lines(self) -> List[Json]:
        """The lines that it has printed since the last call, parsed; does not wait."""
        *whole, self._rest = (self._rest + self._read()).split(b"\n")
        return [parse(line.decode("utf-8", "replace")) for line in whole]

    def _read(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.read() or b""

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _end_with_parent() -> None:
    """In the child: the kernel ends it when the thread that started it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
