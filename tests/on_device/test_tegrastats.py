"""Real lines of tegrastats, as the boards printed them."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from jetway.tasks.on_device.telemetry import tegrastats

LINES = json.loads((Path(__file__).parents[1] / "data/tegrastats/lines.json").read_text())

# What a reader of the line sees at once: rails now, graphics clocks, cores that are on, peaks and sensors that are off.
SEEN = {
    "Nano, JetPack 4, user": ({"POM_5V_IN": 933, "POM_5V_GPU": 0, "POM_5V_CPU": 84}, None, 4, {}),
    "Nano, JetPack 4, root": ({"POM_5V_IN": 2003, "POM_5V_GPU": 0, "POM_5V_CPU": 320}, [76], 2, {}),
    "AGX Xavier, JetPack 4, root": (
        {"GPU": 1155, "CPU": 385, "SOC": 2502, "CV": 0, "VDDRQ": 192, "SYS5V": 2692}, [1377], 8, {},
    ),
    "Xavier NX, JetPack 5": ({"VDD_IN": 5079, "VDD_CPU_GPU_CV": 696, "VDD_SOC": 1104}, [510], 4, {}),
    "AGX Orin, JetPack 5, root": (
        {"VDD_GPU_SOC": 2390, "VDD_CPU_CV": 796, "VIN_SYS_5V0": 3522, "VDDQ_VDD2_1V8AO": 301}, [0], 12, {},
    ),
    "Orin Nano, JetPack 6": ({"VDD_IN": 5704, "VDD_CPU_GPU_CV": 831, "VDD_SOC": 1624}, [305], 6, {}),
    "AGX Orin, JetPack 6.2.1, L4T 36.4.4": (
        {"VDD_GPU_SOC": 2412, "VDD_CPU_CV": 1607, "VIN_SYS_5V0": 4707}, [0, 0], 12, {},
    ),
    "AGX Thor, JetPack 7.x, user": (
        {"VDD_GPU": 0, "VDD_CPU_SOC_MSS": 5535, "VIN_SYS_5V0": 5040, "VIN": 16802}, None, 14, {},
    ),
    "AGX Thor, JetPack 7.1, L4T 38.4.0, root": (
        {"VDD_GPU": 1962, "VDD_CPU_SOC_MSS": 5887, "VIN_SYS_5V0": 5635, "VIN": 19780}, [314] * 3, 14, {},
    ),
    "AGX Thor, JetPack 7.2, L4T 39.2.0": (
        {"VDD_GPU": 4925, "VDD_CPU_SOC_MSS": 7953, "VIN_SYS_5V0": 6667}, [314] * 3, 14,
        {"cpu": 34.843, "tj": 35.906, "soc012": 34.437, "gpu": 35.906, "soc345": 34.437},
    ),
    "AGX Thor, JetPack 7.2, L4T 39.2.0, user": (
        {"VDD_GPU": 37528, "VDD_CPU_SOC_MSS": 18961, "VIN_SYS_5V0": 18331, "VIN": 87426}, None, 14, {},
    ),
    "AGX Thor, JetPack 7.2, L4T 39": (
        {"VDD_GPU": 37939, "VDD_CPU_SOC_MSS": 30059, "VIN_SYS_5V0": 15486, "VIN": 124486}, [1574] * 3, 3,
        {"cpu": 61.75, "tj": 66.625, "gpu": 66.625, "soc012": 58.781, "soc345": 60.031},
    ),
    "AGX Orin, JetPack 7.2, L4T 39.2": (
        {"VDD_GPU_SOC": 5139, "VDD_CPU_CV": 3268, "VIN_SYS_5V0": 5500}, [1300, 1300], 12,
        {"cpu": 52.968, "soc2": 48.406, "soc0": 49.531, "gpu": 47.625},
    ),
}  # fmt: skip

by_platform = pytest.mark.parametrize("row", [pytest.param(row, id=row["platform"]) for row in LINES])


@by_platform
def test_what_a_reader_sees(row):
    rails, gpu_mhz, cores, peaks = SEEN[row["platform"]]
    found = tegrastats.parse(row["line"])
    assert {name: rail["now_mw"] for name, rail in found["rails"].items()} == rails
    assert found.get("gpu", {}).get("mhz") == gpu_mhz
    assert len([core for core in found["cpu"] if core]) == cores
    assert found.get("peak_temperatures_c", {}) == peaks


def numbers_in(value):
    """All numbers of a parsed line, wherever they are."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers_in(part)]
    if isinstance(value, list):
        return [number for part in value for number in numbers_in(part)]
    return [] if value is None or isinstance(value, str) else [float(value)]


@by_platform
def test_no_number_is_lost_or_made_up(row):
    """Against a reader that knows no field: every number that is not part of a name."""
    found = tegrastats.parse(row["line"])
    line = re.sub(r"^[\d-]+ [\d:]+ ", "", row["line"])
    line = re.sub(r"\bNC \d+mW/\d+mW", "", line.replace("-256C", "")).replace("x", " ")
    expected = re.findall(r"(?<![\w.])\d+(?:\.\d+)?", line)
    found.pop("unconnected_rails", None)
    assert Counter(numbers_in(found)) == Counter(float(text) for text in expected)


@by_platform
def test_no_word_is_left(row):
    found = tegrastats.parse(row["line"])
    assert found["unknown"] == []
    assert ("time" in found) == bool(re.match(r"\d\d-\d\d-", row["line"]))
    assert found.get("unconnected_rails", 0) == row["line"].count("NC 0mW/0mW")
    off = {name for name, value in found["temperatures_c"].items() if value is None}
    assert off == set(re.findall(r"(\w+)@-256C", row["line"]))
    assert set(found["temperatures_c"]) == set(re.findall(r"(\w+)@-?[\d.]+C", row["line"]))
    assert {name for name, value in found.get("engines", {}).items() if value is None} == {
        name.replace("_FREQ", "") for name in re.findall(r"(\w+) off", row["line"])
    }


def test_each_shape_of_engine():
    line = "NVENC 79%@166 NVDEC off VIC_FREQ 601 NVENC0_FREQ @314 PVA0_FREQ off APE 200 NVDLA0_FREQ @1600"
    assert tegrastats.parse(line) == {
        "unknown": [],
        "engines": {
            "NVENC": {"load_percent": 79, "mhz": [166]},
            "NVDEC": None,
            "VIC": {"mhz": [601]},
            "NVENC0": {"mhz": [314]},
            "PVA0": None,
            "APE": {"mhz": [200]},
            "NVDLA0": {"mhz": [1600]},
        },
    }


@pytest.mark.parametrize(
    ("text", "gpu"),
    [
        ("GR3D_FREQ 7%", {"load_percent": 7}),
        ("GR3D_FREQ 0%@76", {"load_percent": 0, "mhz": [76]}),
        ("GR3D_FREQ 0%@[510]", {"load_percent": 0, "mhz": [510]}),
        ("GR3D_FREQ 0%@[0,0]", {"load_percent": 0, "mhz": [0, 0]}),
        ("GR3D_FREQ @[314,314,314]", {"mhz": [314, 314, 314]}),
    ],
)
def test_each_shape_of_the_gpu(text, gpu):
    assert tegrastats.parse(text + " VDD_GPU 1mW/2mW")["gpu"] == gpu


def test_a_field_of_a_jetpack_to_come_is_kept_as_unknown():
    found = tegrastats.parse("RAM 1/2MB (lfb 3x4MB) QUANTUM <7> CPU [1%@2] NPU{3} VDD_IN 5mW/6mW")
    assert found["unknown"] == ["QUANTUM", "<7>", "NPU{3}"]
    assert found["cpu"] == [{"load_percent": 1, "mhz": 2}]
    assert found["rails"] == {"VDD_IN": {"now_mw": 5, "mean_mw": 6}}


@pytest.fixture
def fake_program(tmp_path, monkeypatch):
    """A tegrastats that prints a real line again and again, and notes its process."""
    script = tmp_path / "tegrastats"
    script.write_text(
        "#!/bin/sh\n"
        f'echo $$ "$@" > {tmp_path}/started\n'
        f"while true; do echo '{LINES[5]['line']}'; sleep 0.02; done\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "started"


def wait_for(path):
    while not (path.exists() and path.read_text().endswith("\n")):
        time.sleep(0.01)
    return path.read_text().split()


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/status").read_text().split("State:")[1].split()[0]
    except OSError:
        return False


def test_the_program_is_read_without_waiting_and_ended(fake_program):
    running = tegrastats.Tegrastats(100)
    pid, *arguments = wait_for(fake_program)
    assert arguments == ["--interval", "100"]
    lines = []
    while len(lines) < 3:
        lines += running.lines()
    assert lines[0]["rails"]["VDD_IN"]["now_mw"] == 5704
    running.close()
    assert not is_running(pid)


def test_the_program_does_not_outlive_who_started_it(fake_program):
    code = (
        "import time\nfrom jetway.tasks.on_device.telemetry import tegrastats\n"
        "running = tegrastats.Tegrastats(100)\ntime.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code])
    pid = wait_for(fake_program)[0]
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)
