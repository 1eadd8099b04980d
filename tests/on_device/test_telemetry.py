"""What a board tells about itself, on fake boards made of files, and what is made of it."""

import math
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from doubles.board import BOARDS

from jetway.tasks.on_device import machine, probe
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.telemetry import (
    boards,
    clocks,
    rails,
    sampler,
    sensors,
    series,
    thermal,
    throttling,
)
from jetway.tasks.on_device.telemetry.series import Series

TOTALS = {
    "Nano JP4.6": ("POM_5V_IN", 4.0),
    "Xavier NX JP5.1": ("VDD_IN", 5.0),
    "AGX Orin JP5.1": ("sum_of_rails", 2.4 + 0.8 + 3.5),
    "Orin Nano JP6.2": ("VDD_IN", 5.7),
    "AGX Thor JP7.2": ("VIN", 20.0),
}
FACTS = {
    "Nano JP4.6": ("Jetson Nano", "32.6.1", "4.6"),
    "Xavier NX JP5.1": ("Jetson Xavier NX", "35.2.1", "5.1"),
    "AGX Orin JP5.1": ("Jetson AGX Orin", "35.4.1", "5.1.2"),
    "Orin Nano JP6.2": ("Jetson Orin Nano 8GB", "36.4.4", "6.2.1"),
    "AGX Thor JP7.2": ("Jetson AGX Thor", "39.2.0", "7.2"),
}
every_board = pytest.mark.parametrize("name", BOARDS)


@every_board
def test_every_connected_rail_is_found_once_with_its_power(board, name):
    made = board(name)
    wired = [rail for monitor in made.kind["monitors"].values() for rail in monitor if rail[0] != "NC"]
    found = rails.find()
    assert sorted(rail.name for rail in found) == sorted(rail[0] for rail in wired)
    expected = {name: (mv * ma / 1e6, mv / 1e3) for name, mv, ma in wired}
    for rail in found:
        assert rail.read() == {
            "power_w": pytest.approx(expected[rail.name][0]),
            "voltage_v": expected[rail.name][1],
        }


@every_board
def test_the_total_is_a_rail_or_a_sum_that_counts_none_twice(board, name):
    board(name)
    with closing(sensors.Sensors()) as source:
        reading = source.read()
    total, watts = TOTALS[name]
    assert sensors.total_of(reading) == total
    assert reading["power_w." + total] == pytest.approx(watts)


@pytest.mark.parametrize(
    ("names", "total", "counted"),
    [
        (["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"], "sum_of_rails", 6),
        (["VDD_SYS_GPU", "VDD_SYS_SOC", "VDD_IN", "VDD_SYS_CPU", "VDD_SYS_DDR"], "VDD_IN", 1),
        (["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"], "sum_of_rails", 3),
        (["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"], "sum_of_rails", 3),
        (["VDDQ_VDD2_1V8AO"], "sum_of_rails", 1),
        ([], None, 0),
    ],
)
def test_totals_of_further_boards(names, total, counted):
    found, parts = boards.total_power(names)
    assert found == total
    assert len(parts) == counted
    assert set(parts) <= set(names)


@every_board
def test_a_board_knows_its_module_and_jetpack(board, name):
    board(name)
    assert boards.facts() == dict(zip(("module", "l4t_version", "jetpack"), FACTS[name], strict=True))


def test_a_release_to_come_is_of_its_family(board):
    made = board("Orin Nano JP6.2")
    made.write("/etc/nv_tegra_release", "# R36 (release), REVISION: 9.9, GCID: 1")
    assert boards.jetpack() == "6"
    made.write("/etc/nv_tegra_release", "# R77 (release), REVISION: 1.0, GCID: 1")
    assert boards.jetpack() is None


def test_a_machine_that_is_no_jetson_tells_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("JETWAY_SIMULATED_ROOT", str(tmp_path))
    assert boards.facts() == {"module": None, "l4t_version": None, "jetpack": None}
    assert rails.find() == []
    assert clocks.limits() == {}
    assert thermal.event_counts() == {}


@every_board
def test_the_gpus_clock_is_found_whatever_the_node_is_called(board, name):
    made = board(name)
    assert clocks.gpu_folder() == made.gpu
    reading = clocks.Clocks().read()
    assert reading["clock_mhz.gpu"] == made.kind["modes"][0]["gpu_hz"] / 2e6
    assert reading["clock_mhz.cpu3"] == made.kind["modes"][0]["cpu_khz"] / 2e3
    assert reading["load_ratio.gpu"] == (None if name == "AGX Thor JP7.2" else 0.25)


def test_the_memory_clock_is_read_where_root_may(board):
    made = board("Orin Nano JP6.2")
    assert "clock_mhz.emc" not in clocks.Clocks().read()
    made.write("/sys/kernel/debug/bpmp/debug/clk/emc/rate", 3_199_000_000)
    assert clocks.Clocks().read()["clock_mhz.emc"] == 3199.0


def test_zones_without_power_and_constant_ones_are_left_out(board):
    made = board("AGX Orin JP5.1")
    assert set(machine.temperatures_c()) == {"cpu-thermal", "tj-thermal"}  # gpu-thermal says -256
    made.write("/sys/class/thermal/thermal_zone7/type", "soc2-thermal")
    (made.root / "sys/class/thermal/thermal_zone7/temp").mkdir()  # reading it fails, as with EAGAIN
    assert set(machine.temperatures_c()) == {"cpu-thermal", "tj-thermal"}
    assert set(machine.temperatures_c()) == {"cpu-thermal", "tj-thermal"}


def test_the_power_chip_is_no_thermometer(board):
    board("Nano JP4.6")
    assert machine.temperatures_c() == {"AO-therm": 27.0, "CPU-therm": 23.0, "GPU-therm": 22.5}


@every_board
def test_fans_and_surface_alerts_do_not_slow_the_chip_down(board, name):
    made = board(name)
    slowing = set(made.kind["cooling"]) - {"pwm-fan", "hot-surface-alert"}
    assert thermal.CoolingDevices().read() == dict.fromkeys(("cooling." + kind for kind in slowing), 0)


def read_with_tegrastats():
    """A reading once the program has printed a line."""
    deadline = time.monotonic() + 20
    with closing(sensors.Sensors(interval_ms=100)) as source:
        while "load_ratio.emc" not in (reading := source.read()) and time.monotonic() < deadline:
            time.sleep(0.02)
    return reading


def test_rails_come_from_tegrastats_where_no_monitor_can_be_read(board):
    made = board("Xavier NX JP5.1")
    for file in made.root.glob("sys/bus/i2c/drivers/*/*/hwmon/hwmon*/name"):
        file.unlink()
    reading = read_with_tegrastats()
    assert reading["power_w.VDD_IN"] == 5.079
    assert sensors.total_of(reading) == "VDD_IN"


def test_tegrastats_tells_what_the_kernels_files_do_not(board):
    board("Orin Nano JP6.2")
    reading = read_with_tegrastats()
    assert reading["clock_mhz.emc"] == 2133.0
    assert reading["load_ratio.emc"] == 0.04
    assert reading["power_w.VDD_IN"] == pytest.approx(5.7)  # the monitor's, not the line's 5.704
    assert reading["clock_mhz.gpu"] == 300.0  # the kernel's, not the line's 305


# Series


def ramp():
    """0 to 4 s, power rising by 1 W a second, and a counter of its energy."""
    found = Series()
    for time_s in (0.0, 1.0, 2.0, 3.0, 4.0):
        found.add(time_s, {"power_w.a": time_s, "energy_j.a": time_s**2 / 2})
    return found


def test_integrals_are_cut_where_the_time_begins_and_ends():
    assert ramp().integral("power_w.a", 0.5, 3.5) == pytest.approx((3.5**2 - 0.5**2) / 2)
    assert ramp().integral("power_w.a", 1.2, 1.4) == pytest.approx((1.4**2 - 1.2**2) / 2)
    assert ramp().integral("power_w.a", 3.0, 6.0) == pytest.approx(3.5 + 2 * 4.0)
    assert ramp().integral("power_w.b", 0.0, 1.0) is None


def test_a_counter_is_read_between_its_samples():
    assert ramp().increase("energy_j.a", 1.5, 3.5) == pytest.approx((4.5 + 8) / 2 - (0.5 + 2) / 2)


def test_what_was_not_read_is_nan_and_in_no_statistic(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Series()
    found.add(0.0, {"a": 1.0})
    found.add(1.0, {"late": 5.0})
    found.add(2.0, {"a": 3.0})
    assert found.statistics("a") == {"mean": 2.0, "min": 1.0, "peak": 3.0}
    assert found.integral("a", 0.0, 2.0) == 4.0
    found.write(str(tmp_path / "x.safetensors"))
    again = series.read(str(tmp_path / "x.safetensors"))
    assert again.times == found.times
    assert [math.isnan(value) for value in again.columns["late"]] == [True, False, True]
    assert list(again.between(1.0, 2.0).times) == [1.0, 2.0]
    assert again.between(1.0, 2.0).values("a") == [3.0]


# The sampler


def test_the_sampler_follows_the_board_at_its_interval(board, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = board("Orin Nano JP6.2")
    with sampler.Sampler(str(tmp_path), 20) as running:
        time.sleep(0.5)
        made.write("/sys/class/hwmon/hwmon1/curr1_input", 2000)
        changed_s = time.monotonic()
        time.sleep(0.5)
    assert running.file["size_bytes"] == Path(running.file["path"]).stat().st_size
    assert len(running.file["sha256"]) == 64
    found, summary = running.series, running.summary()
    assert summary["samples"] == len(found.times) > 15
    assert 15 < summary["interval_ms"] < 200
    assert set(found.between(0, changed_s - 0.1).values("power_w.VDD_IN")) == {5.7}
    assert set(found.between(changed_s + 0.1, changed_s + 9).values("power_w.VDD_IN")) == {10.0}
    assert summary["columns"]["power_w.VDD_IN"]["peak"] == 10.0
    assert summary["columns"]["memory_used_mib"]["mean"] == 2500.0


def test_a_sum_with_a_rail_missing_is_none(board):
    made = board("AGX Orin JP5.1")
    with closing(sensors.Sensors()) as source:
        assert source.read()["power_w.sum_of_rails"] == pytest.approx(6.7)
        (made.root / "sys/class/hwmon/hwmon1/curr2_input").unlink()
        reading = source.read()
    assert "power_w.sum_of_rails" not in reading
    assert reading["power_w.VDD_GPU_SOC"] == pytest.approx(2.4)


def test_power_is_left_alone_where_it_is_not_wanted(board):
    board("AGX Orin JP5.1")
    reading = sensors.Sensors(power=False).read()
    assert not any(name.startswith(("power_w.", "voltage_v.")) for name in reading)
    assert reading["temperature_c.cpu-thermal"] == 41.437


def test_a_reading_that_takes_longer_than_the_interval_delays_the_next(board, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    board("AGX Orin JP5.1")
    with sampler.Sampler(str(tmp_path), 0) as running:
        time.sleep(0.5)
    times = running.series.times
    assert len(times) > 20
    assert list(times) == sorted(times)


def test_the_sampler_ends_with_the_process_that_started_it(tmp_path):
    code = (
        "import sys, time\nfrom jetway.tasks.on_device.telemetry import sampler\n"
        "with sampler.Sampler('.', 50) as running:\n"
        "    print(running._process.pid, flush=True)\n    time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_a_sampler_that_cannot_start_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampler, "MAIN", "input(); raise SystemExit('broken')")
    with (
        pytest.raises(DeviceError, match="samples the sensors failed"),
        sampler.Sampler(str(tmp_path), 50),
    ):
        pass


def test_an_error_in_the_body_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError), sampler.Sampler(str(tmp_path), 50) as running:
        raise ZeroDivisionError
    assert running._process.poll() is not None


# Throttling


def sampled(count=20, **columns):
    found = Series()
    for index in range(count):
        values = {name.replace("__", "."): column for name, column in columns.items()}
        found.add(float(index), {n: v[index] if isinstance(v, list) else v for n, v in values.items()})
    return found


def test_a_quiet_board_gives_no_reason(board):
    board("Orin Nano JP6.2")
    state = throttling.state()
    assert state["power_mode"] == "15W"
    quiet = sampled(clock_mhz__gpu=300.0, load_ratio__gpu=0.3, **{"cooling__cpu-throttle-alert": 0.0})
    assert throttling.reasons(state, throttling.state(), quiet) == []


def reasons_after(made, change, samples=None):
    before = throttling.state()
    change()
    return throttling.reasons(before, throttling.state(), samples or Series())


@pytest.mark.parametrize(
    ("counter", "words"),
    [("oc1", "supply voltage"), ("oc2", "mean current"), ("oc3", "momentary current")],
)
def test_counted_events_are_reasons(board, counter, words):
    made = board("Orin Nano JP6.2")
    path = f"/sys/class/hwmon/hwmon9/{counter}_event_cnt"
    count = int(made.read(path))
    (reason,) = reasons_after(made, lambda: made.write(path, count + 7))
    assert "throttled 7 times" in reason
    assert words in reason
    assert counter.upper() in reason
    advice = "stronger supply" if counter == "oc1" else "power mode 15W asks for too much"
    assert advice in reason


def test_a_changed_mode_and_its_clocks_are_reasons(board):
    made = board("Orin Nano JP6.2")
    found = reasons_after(made, lambda: subprocess.run(["nvpmodel", "-m", "2"], check=True))
    assert found[0] == "the power mode changed from 15W to MAXN_SUPER during the session"
    assert "the highest clock of gpu changed from 600 MHz to 1300 MHz during the session" in found


def test_a_core_that_went_off_is_a_reason(board):
    made = board("Nano JP4.6")
    folder = made.root / "sys/devices/system/cpu/cpu3/cpufreq"
    (reason,) = reasons_after(made, lambda: folder.rename(folder.with_name("gone")))
    assert reason == "the highest clock of cpu3 changed from 2200 MHz to off during the session"


def test_logged_alarms_are_reasons_once(board):
    made = board("Nano JP4.6")
    old = "[    9.1] soctherm: OC ALARM 0x00000001"
    made.configure(kernel_log=["[    1.0] Booting", old])
    new = "[   77.1] soctherm: OC ALARM 0x00000001"
    (reason,) = reasons_after(made, lambda: made.configure(kernel_log=[old, "[ 76.0] usb 1-2", new]))
    assert "logged 1 over-current alarms" in reason
    assert new in reason
    assert reasons_after(made, lambda: None) == []


def test_a_raspberry_pis_alarm_is_a_reason(board):
    made = board("Nano JP4.6")
    made.write("/sys/class/hwmon/hwmon4/name", "rpi_volt")
    made.write("/sys/class/hwmon/hwmon4/in0_lcrit_alarm", 0)
    assert reasons_after(made, lambda: None) == []
    (reason,) = reasons_after(made, lambda: made.write("/sys/class/hwmon/hwmon4/in0_lcrit_alarm", 1))
    assert "supply voltage" in reason


def test_a_cooling_device_at_work_is_a_reason(board):
    made = board("Xavier NX JP5.1")
    samples = sampled(**{"cooling.cpufreq-cpu0": [0.0] * 15 + [2.0] * 5})
    (reason,) = reasons_after(made, lambda: None, samples)
    assert reason.startswith("cpufreq-cpu0 slowed the chip down in 25% of the samples")


@pytest.mark.parametrize(
    ("min_mhz", "load", "clock", "slow"),
    [
        (300, 0.99, 900.0, True),  # busy, and slower than it may be
        (300, 0.30, 900.0, False),  # little to do: its governor saves power
        (1300, 0.30, 900.0, True),  # locked, and yet slower
        (1300, 0.30, 1295.0, False),
        (300, 0.99, 1300.0, False),
        (300, math.nan, 900.0, False),  # nothing tells whether it was busy
        (1300, math.nan, 900.0, True),
        (1300, 0.99, 0.0, False),  # powered down between two queries
    ],
)
def test_a_clock_that_drops_while_the_gpu_is_busy_is_a_reason(board, min_mhz, load, clock, slow):
    made = board("Xavier NX JP5.1")
    made.write(f"{made.gpu}/min_freq", min_mhz * 1_000_000)
    samples = sampled(clock_mhz__gpu=clock, load_ratio__gpu=load)
    found = reasons_after(made, lambda: None, samples)
    assert len(found) == slow
    if slow:
        assert "the clock of the GPU fell to 900 of 1300 MHz, in 100%" in found[0]


def test_a_few_slow_samples_are_the_governors(board):
    made = board("Xavier NX JP5.1")
    samples = sampled(clock_mhz__gpu=[900.0, 900.0] + [1300.0] * 18, load_ratio__gpu=0.99)
    assert reasons_after(made, lambda: None, samples) == []


def test_a_locked_core_that_slows_down_is_a_reason(board):
    made = board("Xavier NX JP5.1")
    made.write("/sys/devices/system/cpu/cpu1/cpufreq/scaling_min_freq", 2_200_000)
    samples = sampled(clock_mhz__cpu0=1100.0, clock_mhz__cpu1=1100.0)
    (reason,) = reasons_after(made, lambda: None, samples)
    assert "the clock of cpu1 fell to 1100 of 2200 MHz" in reason


def test_a_hot_card_is_a_reason_and_its_power_limit_a_note(board):
    made = board("Xavier NX JP5.1")
    samples = sampled(clock_limits__gpu=[0x4] * 15 + [0x20] * 5)
    (reason,) = reasons_after(made, lambda: None, samples)
    assert reason == "the GPU was slowed down because it was hot in 25% of the samples"
    (note,) = throttling.notes(throttling.state(), samples)
    assert note == "the GPU was at its power limit in 75% of the samples"


@pytest.mark.parametrize(("name", "unseen"), [("Nano JP4.6", True), ("Orin Nano JP6.2", False)])
def test_alarms_that_nobody_could_see_are_told(board, name, unseen):
    """A Nano counts none, and here its user may not read the kernel's log either."""
    made = board(name)
    made.configure(kernel_log=None)
    notes = throttling.notes(throttling.state(), Series())
    assert ["dmesg_restrict" in note for note in notes] == [True] * unseen


def test_a_log_that_lost_its_oldest_lines_still_shows_the_new_ones():
    assert throttling.new_lines(["a", "b"], ["b", "c"]) == ["c"]
    assert throttling.new_lines(["a", "b"], ["c", "d"]) == ["c", "d"]
    assert throttling.new_lines([], ["c"]) == ["c"]


@every_board
def test_the_probe_tells_power_modes_rails_module_and_jetpack(board, name):
    made = board(name)
    found = probe.run({}, print)
    assert found["power_modes"] == [mode["name"] for mode in made.kind["modes"]]
    assert found["power_mode"] == made.kind["modes"][0]["name"]
    assert found["power"]["total"] == TOTALS[name][0]
    assert set(found["power"]["rails"]) >= {TOTALS[name][0]} - {"sum_of_rails"}
    assert (found["module"], found["l4t_version"], found["jetpack"]) == FACTS[name]
    assert found["clock_limits"]["gpu"]["max_mhz"] == made.kind["modes"][0]["gpu_hz"] / 1e6
    assert found["simulated"] is True


def test_the_probe_tells_the_graphics_card(nvml_double):
    found = probe.run({}, print)["power"]
    assert found["card"]["name"] == "Card without a meter"
    assert found["total"] is None


def test_the_real_machine_is_read_without_failing():
    assert "JETWAY_SIMULATED_ROOT" not in os.environ
    state = throttling.state()
    reading = sensors.Sensors().read()
    assert reading["memory_used_mib"] > 0
    assert throttling.reasons(state, throttling.state(), Series()) == []
