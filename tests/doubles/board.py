"""A fake Jetson made of files: the kernel's under a folder for JETWAY_SIMULATED_ROOT, and the commands that it brings.

It is for plumbing: what it says about power, clocks and heat was made up.
"""

import json
import os
import sys
import zlib
from pathlib import Path

#: One that other users may run too: a developer's own may lie in a folder that is closed to them.
PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
COMMANDS = ("nvpmodel", "jetson_clocks", "tegrastats", "dmesg", "sudo")
LINES = json.loads((Path(__file__).parents[1] / "data/tegrastats/lines.json").read_text())

MAXN = {"id": 0, "name": "MAXN", "gpu_hz": 1_300_000_000, "cpu_khz": 2_200_000}
LOW = {"id": 1, "name": "15W", "gpu_hz": 600_000_000, "cpu_khz": 1_100_000}
#: What the fake boards differ in. ``rails`` of a monitor: name, millivolts, milliamperes.
BOARDS = {
    "Nano JP4.6": {
        "model": "NVIDIA Jetson Nano Developer Kit",
        "compatible": "nvidia,p3449-0000-b00+p3448-0000-b00\0nvidia,jetson-nano\0nvidia,tegra210",
        "l4t": "# R32 (release), REVISION: 6.1, GCID: 27863751, BOARD: t210ref, EABI: aarch64",
        "gpu": ("57000000.gpu", "gpu"),
        "monitors": {"iio 6-0040": [("POM_5V_IN", 5000, 800), ("POM_5V_GPU", 5000, 200), ("POM_5V_CPU", 5000, 100)]},
        "zones": {"AO-therm": 27000, "CPU-therm": 23000, "GPU-therm": 22500, "PMIC-Die": 100000},
        "cooling": ("pwm-fan", "cpu-balanced", "gpu-balanced"),
        "modes": [MAXN, dict(LOW, name="5W")],
        "tegrastats": "Nano, JetPack 4, user",
    },
    "Xavier NX JP5.1": {
        "model": "NVIDIA Jetson Xavier NX Developer Kit",
        "compatible": "nvidia,p3509-0000+p3668-0000\0nvidia,tegra194",
        "l4t": "# R35 (release), REVISION: 2.1, GCID: 32413640, BOARD: t186ref, EABI: aarch64",
        "gpu": ("17000000.gv11b", "gv11b"),
        "monitors": {"ina3221 7-0040": [("VDD_IN", 5000, 1000), ("VDD_CPU_GPU_CV", 5000, 140), ("VDD_SOC", 5000, 220)]},
        "zones": {"CPU-therm": 39500, "GPU-therm": 37500, "PMIC-Die": 50000},
        "cooling": ("pwm-fan", "cpufreq-cpu0", "devfreq-17000000.gv11b"),
        "modes": [dict(MAXN, id=8, name="MODE_20W_6CORE"), dict(LOW, id=2, name="MODE_15W_6CORE")],
        "query_noise": ["NV Fan Mode:quiet"],
        "tegrastats": "Xavier NX, JetPack 5",
    },
    "AGX Orin JP5.1": {
        "model": "Jetson AGX Orin Developer Kit",
        "compatible": "nvidia,p3737-0000+p3701-0000\0nvidia,p3701-0000\0nvidia,tegra234",
        "l4t": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64",
        "gpu": ("17000000.ga10b", "ga10b"),
        "monitors": {
            "ina3221 1-0040": [("VDD_GPU_SOC", 20000, 120), ("VDD_CPU_CV", 20000, 40), ("VIN_SYS_5V0", 5000, 700)],
            "ina3221 1-0041": [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 60), ("NC", 0, 0)],
        },
        "zones": {"cpu-thermal": 41437, "gpu-thermal": -256000, "tj-thermal": 41656},
        "cooling": ("pwm-fan", "cpu-throttle-alert", "gpu-throttle-alert", "hot-surface-alert"),
        "modes": [MAXN, LOW],
        "tegrastats": "AGX Orin, JetPack 5, root",
    },
    "Orin Nano JP6.2": {
        "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234",
        "l4t": "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64",
        "gpu": ("17000000.gpu", "gpu"),
        "monitors": {"ina3221 1-0040": [("VDD_IN", 5000, 1140), ("VDD_CPU_GPU_CV", 5000, 166), ("VDD_SOC", 5000, 324)]},
        "zones": {"cpu-thermal": 46531, "gpu-thermal": 48218, "tj-thermal": 48843},
        "cooling": ("pwm-fan", "cpu-throttle-alert", "gpu-throttle-alert", "hot-surface-alert"),
        "counters": {"oc1": 0, "oc2": 0, "oc3": 15},
        "modes": [dict(LOW, id=0), dict(MAXN, id=2, name="MAXN_SUPER"), dict(LOW, id=3, name="7W", reboot=True)],
        "query_noise": ["NVPM WARN: fan mode is not set!"],
        "tegrastats": "Orin Nano, JetPack 6",
    },
    "AGX Thor JP7.2": {
        "model": "NVIDIA Jetson AGX Thor Developer Kit",
        "compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264",
        "l4t": "# R39 (release), REVISION: 2.0, GCID: 45000000, BOARD: generic, EABI: aarch64",
        "gpu": ("gpu-gpc-0", None),
        "monitors": {
            "ina3221 2-0040": [("VDD_GPU", 20000, 100), ("VDD_CPU_SOC_MSS", 20000, 300), ("VIN_SYS_5V0", 5000, 1100)],
            "ina238 2-0044": [("VIN", 20000, 1000)],
        },
        "zones": {"cpu-thermal": 37343, "gpu-thermal": 38875, "tj-thermal": 38875},
        "cooling": ("pwm-fan", "cpu-throttle-alert"),
        "counters": {"oc1": 0, "oc3": 2},
        "modes": [MAXN, dict(LOW, name="120W")],
        "tegrastats": "AGX Thor, JetPack 7.2, L4T 39.2.0, user",
    },
}  # fmt: skip


class Board:
    """A fake board in a folder: ``environment`` is for a process that is to run on it."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.kind = BOARDS[name]
        self._write_files()
        self._write_commands()
        modes = self.kind["modes"]
        self.configure(
            modes=modes,
            mode=modes[0]["id"],
            query_noise=self.kind.get("query_noise", []),
            tegrastats=next(row["line"] for row in LINES if row["platform"] == self.kind["tegrastats"]),
        )

    @property
    def environment(self) -> dict[str, str]:
        return {
            "JETWAY_SIMULATED_ROOT": str(self.root),
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
        }

    def write(self, path: str, value: object) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")

    def read(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text().strip()

    def configure(self, **settings: object) -> None:
        """What the commands do: keys of board.json, which board_commands.py reads."""
        file = self.root / "board.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | settings))

    @property
    def mode(self) -> int:
        return int(json.loads((self.root / "board.json").read_text())["mode"])

    def commands(self) -> list[str]:
        """What was run on the board so far."""
        file = self.root / "commands.log"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def gpu(self) -> str:
        """The GPU's devfreq folder."""
        return f"/sys/class/devfreq/{self.kind['gpu'][0]}"

    def _write_files(self) -> None:
        kind = self.kind
        self.write("/proc/device-tree/model", kind["model"] + "\0")
        self.write("/proc/device-tree/compatible", kind["compatible"] + "\0")
        self.write(
            "/proc/device-tree/serial-number", f"{zlib.crc32(bytes(self.root)):013}\0"
        )  # leases are by it
        self.write("/proc/sys/kernel/random/boot_id", "6c1b1bd0-0000-4000-8000-000000000001")
        self.write("/proc/meminfo", "MemTotal: 7802880 kB\nMemAvailable: 5242880 kB")
        self.write("/etc/nv_tegra_release", kind["l4t"])
        for index, (zone, millidegrees) in enumerate(kind["zones"].items()):
            self.write(f"/sys/class/thermal/thermal_zone{index}/type", zone)
            self.write(f"/sys/class/thermal/thermal_zone{index}/temp", millidegrees)
        for index, cooling in enumerate(kind["cooling"]):
            self.write(f"/sys/class/thermal/cooling_device{index}/type", cooling)
            self.write(f"/sys/class/thermal/cooling_device{index}/cur_state", int(cooling == "pwm-fan"))
        for index, (monitor, rails) in enumerate(kind["monitors"].items()):
            getattr(self, "_write_" + monitor.split()[0])(index, monitor.split()[1], rails)
        self._write_counters(kind.get("counters", {}))
        self._write_clocks()

    def _write_clocks(self) -> None:
        mode = self.kind["modes"][0]
        node = self.kind["gpu"][1]
        if node:
            self.write(f"{self.gpu}/device/of_node/name", node + "\0")
            self.write(f"{self.gpu}/device/load", 250)
        self.write("/sys/class/devfreq/15340000.vic/device/of_node/name", "vic\0")
        for part, divisor in (("min", 4), ("cur", 2), ("max", 1)):
            self.write(f"{self.gpu}/{part}_freq", mode["gpu_hz"] // divisor)
            for core in range(4):
                folder = f"/sys/devices/system/cpu/cpu{core}/cpufreq"
                self.write(f"{folder}/scaling_{part}_freq", mode["cpu_khz"] // divisor)
                self.write(f"{folder}/scaling_governor", "schedutil")
        self.write(f"{self.gpu}/governor", "nvhost_podgov")

    def _write_counters(self, counts: dict[str, int]) -> None:
        if counts:
            self.write("/sys/class/hwmon/hwmon9/name", "soctherm_oc")
        for name, count in counts.items():
            self.write(f"/sys/class/hwmon/hwmon9/{name}_event_cnt", count)
            self.write(f"/sys/class/hwmon/hwmon9/{name}_throt_en", 1)

    def _write_iio(self, index: int, address: str, rails: list[tuple[str, int, int]]) -> None:
        folder = f"/sys/bus/i2c/drivers/ina3221x/{address}/iio:device{index}"
        for channel, (name, millivolts, milliamperes) in enumerate(rails):
            self.write(f"{folder}/rail_name_{channel}", name)
            self.write(f"{folder}/in_voltage{channel}_input", millivolts)
            self.write(f"{folder}/in_current{channel}_input", milliamperes)
            self.write(f"{folder}/in_power{channel}_input", millivolts * milliamperes // 1000)

    def _write_ina3221(self, index: int, address: str, rails: list[tuple[str, int, int]]) -> None:
        """As the driver shows it: a seventh voltage that is no rail's, and the folder by two paths."""
        folder = f"/sys/bus/i2c/drivers/ina3221/{address}/hwmon/hwmon{index + 1}"
        self.write(f"{folder}/name", "ina3221")
        for channel, (name, millivolts, milliamperes) in enumerate(rails, 1):
            self.write(f"{folder}/in{channel}_label", name)
            self.write(f"{folder}/in{channel}_input", millivolts)
            self.write(f"{folder}/curr{channel}_input", milliamperes)
            self.write(f"{folder}/in{channel + 3}_input", 4)
        self.write(f"{folder}/in7_label", "sum of shunt voltages")
        self.write(f"{folder}/in7_input", 12)
        self._link(folder)

    def _write_ina238(self, index: int, address: str, rails: list[tuple[str, int, int]]) -> None:
        folder = f"/sys/bus/i2c/drivers/ina238/{address}/hwmon/hwmon{index + 1}"
        ((_, millivolts, milliamperes),) = rails
        self.write(f"{folder}/name", "ina238")
        self.write(f"{folder}/in0_input", 3)
        self.write(f"{folder}/in1_input", millivolts)
        self.write(f"{folder}/curr1_input", milliamperes)
        self.write(f"{folder}/power1_input", millivolts * milliamperes)
        self._link(folder)

    def _link(self, folder: str) -> None:
        link = self.root / "sys/class/hwmon" / Path(folder).name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(self.root / folder.lstrip("/"))

    def _write_commands(self) -> None:
        program = (Path(__file__).parent / "board_commands.py").read_text()
        for name in COMMANDS:
            file = self.root / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"#!{PYTHON} -IS\n{program}")
            file.chmod(0o755)
