import os

import pytest

from jetway.tasks.on_device import lease, machine, probe


@pytest.fixture
def other_machine(tmp_path, monkeypatch):
    """A machine of files: what is not there, the machine does not tell."""
    monkeypatch.setenv("JETWAY_SIMULATED_ROOT", str(tmp_path))

    def write(path, text):
        file = tmp_path / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


def test_a_real_machine_says_so():
    assert probe.run({}, print)["simulated"] is False
    assert machine.system_path("/proc/stat") == "/proc/stat"
    assert "/proc/sys/kernel/random/boot_id" in machine.system_files("/proc/sys/kernel/random/*")


def test_a_simulated_machine_is_read_from_its_folder_and_says_so(other_machine):
    other_machine("/proc/device-tree/model", "Board of paper\0")
    other_machine("/proc/device-tree/serial-number", "1421\0")
    other_machine("/proc/sys/kernel/random/boot_id", "the-boot\n")
    other_machine("/proc/meminfo", "MemTotal: 2048 kB\nMemAvailable: 1024 kB\nSwapFree: 512 kB\n")
    other_machine("/sys/class/thermal/thermal_zone1/temp", "42500\n")
    other_machine("/sys/class/thermal/thermal_zone1/type", "CPU-therm\n")
    facts = probe.run({}, print)
    assert facts["simulated"] is True
    assert facts["board"] == "Board of paper"
    assert facts["boot_id"] == lease.boot_id() == "the-boot"
    assert facts["accelerators"]["tensorrt"] == "1421"
    assert facts["memory_mib"] == {"total": 2.0, "available": 1.0, "swap_free": 0.5}
    assert machine.temperatures_c() == {"CPU-therm": 42.5}
    assert facts["l4t"] is None


def test_a_simulated_gpu_has_its_own_lease(other_machine):
    other_machine("/proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t X\nGPU UUID: \t GPU-42\n")
    assert lease.accelerator_id("tensorrt") == "GPU-42"


def test_this_process_is_real_on_any_machine(other_machine):
    assert machine.process_memory_mib()["now"] > 1
    assert machine.system_path("/proc/self/status") == "/proc/self/status"
    assert machine.read_text("/proc/stat") is None
    assert os.path.exists("/proc/stat")
