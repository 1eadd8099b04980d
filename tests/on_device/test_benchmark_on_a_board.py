"""The benchmark verb on a fake Jetson: set up, watched, measured for power, and put back. The engine is real."""

import subprocess

import pytest
from safetensors.numpy import load_file

from jetway.tasks.on_device import benchmark, passport, power_pass
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.latency import CANARY

pytestmark = pytest.mark.serial

LIMITS = {
    "warmup_runs": 1,
    "min_queries": 20,
    "min_duration_s": 0.12,
    "slice_s": 0.02,
    "max_drift_ratio": 100.0,
    "max_extensions": 0,
    "max_duration_s": 30.0,
    "seed": 7,
}


@pytest.fixture
def request_on(board, workplace, networks):
    def make(name, **settings):
        made = board(name)
        image = workplace.images(1)
        entries = [workplace.entry(variant, networks["conv"], image) for variant in ("first", "second")]
        canary = workplace.entry(CANARY, networks["conv"], image)
        return made, {
            **LIMITS, "engines": entries, "canary": canary, "work_dir": str(workplace.work_dir), **settings,
        }  # fmt: skip

    return make


def of_the_board(reasons):
    """Without those of this machine, on which the tests run beside others."""
    return [reason for reason in reasons if "other processes held" not in reason]


def test_a_session_is_set_up_watched_and_put_back(request_on, workplace, monkeypatch):
    monkeypatch.setattr(power_pass, "SETTLE_S", 0.1)
    power = {"duration_s": 0.4, "idle_s": 0.2, "interval_ms": 20}
    made, asked = request_on("Xavier NX JP5.1", power=power, power_mode="MODE_15W_6CORE", lock_clocks=True)
    modes = []
    result = benchmark.run(asked, lambda line: modes.append(made.mode))
    assert set(modes) == {2}
    assert made.mode == 8
    assert of_the_board(result["reasons"]) == []
    assert result["simulated"] is True
    assert result["power_mode"]["asked"] == result["power_mode"]["during"] == "MODE_15W_6CORE"
    assert result["power_mode"]["before"] == "MODE_20W_6CORE"
    assert result["power_mode"]["restored"] is True
    assert result["telemetry"]["before"]["clock_limits"]["gpu"]["min_mhz"] == 600.0
    telemetry = result["telemetry"]["samples"]
    columns = load_file(telemetry["path"])
    assert passport.file_sha256(telemetry["path"]) == telemetry["sha256"]
    assert len(columns["time_s"]) > 2
    assert set(columns["clock_mhz.gpu"]) == {600.0}
    assert "power_w.VDD_IN" not in columns
    assert result["power"]["total"] == "VDD_IN"
    for name in ("first", "second"):
        found = result["power"]["variants"][name]
        assert found["power_w_mean"] == pytest.approx(5.0)
        assert found["inferences"] > 20
        assert found["energy_mj_per_inference"] > 0
    assert set(load_file(result["power"]["samples"]["path"])["power_w.VDD_IN"]) == {5.0}


def in_round(number, act):
    """A progress callback that acts once, in that round."""
    seen = []

    def progress(line):
        if line["text"] == f"round {number}" and not seen:
            seen.append(act())

    return progress


def test_throttling_in_the_session_makes_it_invalid(request_on):
    made, asked = request_on("Orin Nano JP6.2")
    path = "/sys/class/hwmon/hwmon9/oc1_event_cnt"
    result = benchmark.run(asked, in_round(5, lambda: made.write(path, 3)))
    (reason,) = of_the_board(result["reasons"])
    assert "throttled 3 times because the supply voltage was too low" in reason


def test_a_clock_that_drops_in_the_session_makes_it_invalid(request_on):
    made, asked = request_on("Orin Nano JP6.2", power_mode="MAXN_SUPER", lock_clocks=True)
    result = benchmark.run(asked, in_round(3, lambda: made.write(f"{made.gpu}/cur_freq", 600_000_000)))
    (reason,) = of_the_board(result["reasons"])
    assert "the clock of the GPU fell to 600 of 1300 MHz" in reason


def test_a_mode_that_someone_changed_meanwhile_makes_it_invalid(request_on):
    made, asked = request_on("Nano JP4.6", telemetry=False)
    command = ["nvpmodel", "-m", "1"]
    result = benchmark.run(asked, in_round(5, lambda: subprocess.run(command, check=True)))
    assert "the power mode changed from MAXN to 5W during the session" in result["reasons"]
    assert "samples" not in result["telemetry"]
    assert made.mode == 1  # nobody asked to set one, so nobody puts one back


def test_a_mode_that_cannot_be_set_ends_the_job_before_anything_runs(request_on, workplace):
    _, asked = request_on("Nano JP4.6", power_mode="TURBO")
    workplace.progress.clear()
    with pytest.raises(DeviceError, match="no power mode 'TURBO'"):
        benchmark.run(asked, workplace.progress.append)
    assert workplace.progress == []


def test_a_real_machine_is_not_called_simulated(workplace, networks):
    image = workplace.images(1)
    entry = workplace.entry("first", networks["conv"], image)
    asked = {
        **LIMITS,
        "engines": [entry],
        "canary": dict(entry, name=CANARY),
        "work_dir": str(workplace.work_dir),
    }
    result = benchmark.run(asked, workplace.progress.append)
    assert result["simulated"] is False
    assert result["power_mode"] == {
        "asked": None, "lock_clocks": False, "before": None, "during": None, "restored": True,
    }  # fmt: skip
    assert result["telemetry"]["summary"]["columns"]["memory_used_mib"]["mean"] > 0
