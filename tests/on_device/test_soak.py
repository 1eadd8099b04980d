"""The soak verb on a real engine: its windows hold what ran in them, and the sensors' readings of their time."""

import time

import pytest

from jetway.tasks.on_device import soak
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.telemetry.series import Series


@pytest.fixture
def request_for(workplace, networks):
    images = workplace.images(1)
    entry = workplace.entry("conv", networks["conv"], images)
    values = {"duration_s": 0.6, "window_s": 0.1, "warmup_runs": 2, "work_dir": str(workplace.work_dir)}
    return lambda **changes: {"engine": entry, **values, **changes}


def test_windows_cover_the_time_asked_for(workplace, request_for):
    result = soak.run(request_for(), workplace.progress.append)
    windows = result["windows"]
    assert 3 <= len(windows) <= 6
    assert [w["elapsed_s"] for w in windows] == sorted(w["elapsed_s"] for w in windows)
    for window in windows:
        seconds = window["end_s"] - window["start_s"]
        assert seconds >= 0.1
        assert window["queries_per_s"] == pytest.approx(window["queries"] / seconds, rel=0.1)
        assert window["process_memory_mib"] > 10
        assert window["device_memory_mib"] is None
    # On a busy machine a window may pass without a sample.
    sampled = [w["memory_used_mib"] for w in windows if w["memory_used_mib"] is not None]
    assert sampled
    assert min(sampled) > 10
    assert workplace.progress[-1]["done"] <= 0.6 == workplace.progress[-1]["total"]
    assert result["telemetry"]["columns"]["memory_used_mib"]["peak"] > 0
    assert isinstance(result["reasons"], list)
    assert result["before"].keys() == result["after"].keys()
    assert result["simulated"] is False


def test_a_slow_query_is_a_window_of_its_own():
    window = soak.run_window(lambda: time.sleep(0.03), 1_000_000)
    assert window["queries"] == 1
    assert window["latency_ms_p50"] >= 30
    assert window["queries_per_s"] == pytest.approx(1000 / window["latency_ms_p50"], rel=0.01)


def test_an_engine_that_is_not_what_it_was_is_refused(workplace, request_for):
    request = request_for()
    with open(request["engine"]["path"], "ab") as file:
        file.write(b"!")
    with pytest.raises(DeviceError, match="corrupt") as caught:
        soak.run(request, workplace.progress.append)
    assert caught.value.kind == "corrupt"


def test_a_window_has_the_hottest_zone_and_the_total_power_of_its_time():
    sampled = Series()
    for second, hot in enumerate((40.0, 50.0, 70.0)):
        sampled.add(
            second,
            {"temperature_c.cpu": 30.0, "temperature_c.gpu": hot, "power_w.VDD_IN": second, "power_w.VDD_SOC": 99.0},
        )  # fmt: skip
    assert soak.sensed(sampled, {"start_s": 0, "end_s": 1}) == {
        "temperature_c": 50.0, "power_w": 0.5, "memory_used_mib": None,
    }  # fmt: skip
    assert soak.sensed(sampled, {"start_s": 5, "end_s": 6})["temperature_c"] is None
