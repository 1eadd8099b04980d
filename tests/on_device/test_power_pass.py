"""The power pass, on fake boards and a double of NVML whose power is known."""

import json
import subprocess
import threading
import time
from pathlib import Path

import pytest

from jetway.tasks.on_device import power_pass
from jetway.tasks.on_device.telemetry import series
from jetway.tasks.target.agent import build_agent

OLD_PYTHONS = [
    path
    for version in ("3.6", "3.8", "3.10", "3.12")
    for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
]

pytestmark = pytest.mark.serial

SETTINGS = {"duration_s": 1.0, "idle_s": 0.6, "interval_ms": 20}


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(power_pass, "SETTLE_S", 0.2)
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")


def opener(events, name, run_once):
    def open_variant():
        events.append("open " + name)
        return run_once, lambda: events.append("close " + name)

    return open_variant


def measure(tmp_path, variants, gpu=None, **settings):
    lines = []
    result = power_pass.measure(variants, SETTINGS | settings, str(tmp_path), gpu, lines.append)
    return result, lines


def test_each_variant_has_its_watts_and_joules_above_rest(board, tmp_path):
    """At rest the module draws 5.7 W; the heavy variant makes it draw 20 W, the light one 10 W."""
    made = board("Orin Nano JP6.2")
    events = []

    def variant(name, milliamperes):
        def open_variant():
            made.write("/sys/class/hwmon/hwmon1/curr1_input", milliamperes)
            return opener(events, name, lambda: time.sleep(0.01))()

        return open_variant

    result, lines = measure(tmp_path, {"heavy": variant("heavy", 4000), "light": variant("light", 2000)})
    assert events == ["open heavy", "close heavy", "open light", "close light"]
    assert [line["text"] for line in lines] == ["power at rest", "power of heavy", "power of light"]
    assert result["total"] == "VDD_IN"
    assert result["idle"]["rails"]["VDD_IN"] == {"mean_w": pytest.approx(5.7), "peak_w": pytest.approx(5.7)}
    for name, watts in (("heavy", 20.0), ("light", 10.0)):
        found = result["variants"][name]
        assert found["total"] == "VDD_IN"
        assert found["power_w_mean"] == pytest.approx(watts)
        assert found["power_w_peak"] == pytest.approx(watts)
        assert found["idle_power_w_mean"] == pytest.approx(5.7)
        assert found["power_above_idle_w_mean"] == pytest.approx(watts - 5.7)
        assert 30 < found["inferences"] <= 100
        energy_mj = 1000 * watts * found["duration_s"] / found["inferences"]
        assert found["energy_mj_per_inference"] == pytest.approx(energy_mj)
        assert found["energy_mj_per_inference_from_counter"] is None
        above_mj = 1000 * (watts - 5.7) * found["duration_s"] / found["inferences"]
        assert found["energy_above_idle_mj_per_inference"] == pytest.approx(above_mj)
        assert found["inferences_per_joule"] == pytest.approx(1000 / energy_mj)
        assert set(found["rails"]) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
        assert found["rails"]["VDD_SOC"]["above_idle_w"] == pytest.approx(0.0)
        assert found["reasons"] == []
    columns = series.read(result["samples"]["path"])
    assert {5.7, 20.0, 10.0} <= set(columns.values("power_w.VDD_IN"))
    assert result["summary"]["samples"] == len(columns.times)


def test_a_board_without_a_total_has_a_sum_that_is_called_one(board, tmp_path):
    board("AGX Orin JP5.1")
    result, _ = measure(tmp_path, {"a": opener([], "a", lambda: time.sleep(0.01))}, duration_s=0.4)
    assert result["total"] == "sum_of_rails"
    assert result["variants"]["a"]["power_w_mean"] == pytest.approx(6.7)
    assert result["variants"]["a"]["rails"]["VDDQ_VDD2_1V8AO"]["mean_w"] == pytest.approx(0.3)


def test_the_counter_and_the_samples_agree(nvml_double, tmp_path, monkeypatch):
    """The double draws 50 W, then 200 W from one second on; its counter is the integral."""
    monkeypatch.setenv("NVML_DOUBLE_STEPS", "1.2:200,2.2:120,3.2:300")
    monkeypatch.setenv("NVML_DOUBLE_START", str(time.monotonic()))
    variants = {"a": opener([], "a", lambda: time.sleep(0.002))}
    result, _ = measure(tmp_path, variants, gpu="GPU-11111111-double", duration_s=3.0)
    found = result["variants"]["a"]
    assert result["total"] == "gpu"
    counted = found["energy_mj_per_inference_from_counter"]
    assert found["energy_mj_per_inference"] == counted
    assert found["energy_mj_per_inference_from_samples"] == pytest.approx(counted, rel=0.03)
    assert found["power_w_peak"] in (200.0, 300.0)
    assert 1000 * found["power_w_mean"] * found["duration_s"] / found["inferences"] == pytest.approx(
        counted, rel=0.05
    )


def test_a_card_without_a_meter_measures_no_power(nvml_double, tmp_path):
    variants = {"a": opener([], "a", lambda: time.sleep(0.01))}
    result, _ = measure(tmp_path, variants, gpu="first", duration_s=0.2, idle_s=0.1)
    assert result["variants"] == {}
    assert "no power monitor" in result["unmeasured"]["a"]
    assert result["summary"]["columns"]["clock_mhz.gpu"]["mean"] == 1410.0


def test_a_cards_power_is_not_that_of_a_variant_that_does_not_use_it(nvml_double, tmp_path):
    variants = {name: opener([], name, lambda: time.sleep(0.01)) for name in ("cpu", "gpu")}
    settings = {"duration_s": 0.3, "idle_s": 0.1, "interval_ms": 20}
    result = power_pass.measure(
        variants, settings, str(tmp_path), "GPU-11111111-double", lambda line: None, off_card=["cpu"]
    )
    assert list(result["variants"]) == ["gpu"]
    assert "does not run on the graphics card" in result["unmeasured"]["cpu"]


def test_throttling_in_the_pass_is_of_the_variant_that_it_met(board, tmp_path):
    made = board("Orin Nano JP6.2")
    path = "/sys/class/hwmon/hwmon9/oc3_event_cnt"

    def throttles():
        made.write(path, int(made.read(path)) + 1)
        time.sleep(0.05)

    variants = {
        "calm": opener([], "calm", lambda: time.sleep(0.01)),
        "hungry": opener([], "hungry", throttles),
        "after": opener([], "after", lambda: time.sleep(0.01)),
    }
    result, _ = measure(tmp_path, variants, duration_s=0.4)
    assert result["variants"]["calm"]["reasons"] == []
    assert "momentary current" in result["variants"]["hungry"]["reasons"][0]
    assert result["variants"]["after"]["reasons"] == []


def test_too_few_samples_are_said(board, tmp_path):
    board("Nano JP4.6")
    variants = {"a": opener([], "a", lambda: time.sleep(0.01))}
    result, _ = measure(tmp_path, variants, duration_s=0.2, interval_ms=150)
    assert any("fewer than 5" in reason for reason in result["variants"]["a"]["reasons"])


def test_a_variant_that_fails_is_closed_and_the_sampler_ended(board, tmp_path):
    board("Nano JP4.6")
    events = []

    def fails():
        raise ZeroDivisionError

    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        measure(tmp_path, {"a": opener(events, "a", fails)})
    assert events == ["open a", "close a"]
    assert set(threading.enumerate()) <= before


IN_ANY_PYTHON = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from jetway.tasks.on_device import power_pass, probe
power_pass.SETTLE_S = 0.1
settings = {"duration_s": 0.4, "idle_s": 0.2, "interval_ms": 20}
variants = {"a": lambda: ((lambda: time.sleep(0.01)), (lambda: None))}
result = power_pass.measure(variants, settings, ".", "GPU-11111111-double", print)
print(json.dumps({"probe": probe.run({}, print), "power": result}))
"""


@pytest.mark.parametrize("python", OLD_PYTHONS, ids=lambda path: path.parent.parent.name)
def test_on_every_python(board, nvml_double, tmp_path, python):
    """From the agent, with nothing but the standard library."""
    board("AGX Orin JP5.1")
    (tmp_path / "agent.pyz").write_bytes(build_agent())
    done = subprocess.run(
        [python, "-c", IN_ANY_PYTHON, "agent.pyz"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["probe"]["power"]["total"] == "sum_of_rails"
    assert found["probe"]["jetpack"] == "5.1.2"
    assert found["power"]["variants"]["a"]["power_w_mean"] == pytest.approx(6.7)
    assert found["power"]["variants"]["a"]["rails"]["gpu"]["mean_w"] == pytest.approx(50.0)
