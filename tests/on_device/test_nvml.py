"""NVML through ctypes, against a double of the library. Nothing here says anything about a GPU."""

import subprocess
import time
from pathlib import Path

import pytest

from jetway.tasks.on_device.telemetry import nvml

SOURCE = Path(__file__).parents[1] / "doubles/nvml_double.c"


def compiled(folder, *flags):
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", *flags, "-o", library, SOURCE], check=True)
    return str(library)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module")
def old_library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("old-nvml"), "-DNVML_DOUBLE_OLD")


@pytest.mark.parametrize("which", ["GPU-11111111-double", "0000:b1:00.0", "0000:B1:00.0"])
def test_a_card_is_found_by_uuid_or_bus_id_and_every_figure_read(library, which):
    device = nvml.Device(which, library)
    assert device.facts() == {
        "name": "Card with a meter",
        "uuid": "GPU-11111111-double",
        "pci_bus_id": "0000:b1:00.0",
        "power_limit_w": 300.0,
        "max_clock_mhz": 1980,
        "measures_power": True,
        "counts_energy": True,
    }
    reading = device.read()
    assert device.read_power() == {"power_w.gpu": 50.0, "energy_j.gpu": pytest.approx(5e9, rel=1e-6)}
    assert reading == {
        "temperature_c.gpu": 41,
        "clock_mhz.gpu": 1410,
        "clock_mhz.gpu_memory": 2619,
        "memory_used_mib.gpu": 3072.0,
        "load_ratio.gpu": 0.87,
        "clock_limits.gpu": 0,
    }
    device.close()


def test_what_a_device_does_not_have_is_none(library):
    first = nvml.Device(None, library)
    assert first.name() == "Card without a meter"
    assert first.power_w() is None
    assert first.energy_j() is None
    assert first.power_limit_w() is None
    assert first.clock_mhz() == 1410
    assert first.facts()["measures_power"] is False


@pytest.mark.parametrize("fixture", ["library", "old_library"])
def test_what_holds_the_clocks_back_is_read_under_both_names(request, monkeypatch, fixture):
    monkeypatch.setenv("NVML_DOUBLE_REASONS", str(0x40 | 0x08))
    device = nvml.Device(None, request.getfixturevalue(fixture))
    assert hasattr(device._library, nvml.REASON_FUNCTIONS[0]) == (fixture == "library")
    assert nvml.reasons_of(device.reason_bits()) == ["hw_slowdown", "hw_thermal_slowdown"]


def test_the_counter_is_the_integral_of_the_power(library, monkeypatch):
    monkeypatch.setenv("NVML_DOUBLE_STEPS", "0.0:200")
    monkeypatch.setenv("NVML_DOUBLE_START", str(time.monotonic()))
    device = nvml.Device("0000:b1:00.0", library)
    before, started = device.energy_j(), time.monotonic()
    time.sleep(0.2)
    assert device.energy_j() - before == pytest.approx(
        device.power_w() * (time.monotonic() - started), rel=0.05
    )


def test_a_machine_without_nvml_has_no_device(monkeypatch, tmp_path):
    monkeypatch.setenv("JETWAY_LIBNVML", str(tmp_path / "absent.so"))
    assert nvml.open_device() is None
    with pytest.raises(nvml.NvmlError, match=r"absent\.so"):
        nvml.Device()


def test_a_driver_that_is_not_loaded_has_no_device(library, monkeypatch):
    monkeypatch.setenv("JETWAY_LIBNVML", library)
    monkeypatch.setenv("NVML_DOUBLE_FAIL", "1")
    assert nvml.open_device() is None
    with pytest.raises(nvml.NvmlError, match="Driver Not Loaded"):
        nvml.Device()


def test_a_card_that_is_not_there_is_refused(library):
    with pytest.raises(nvml.NvmlError, match="2 GPUs, and none is 0000:ff"):
        nvml.Device("0000:ff:00.0", library)
