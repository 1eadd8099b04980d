"""What the passes beside the timed queries give: metrics by name, and series thin enough for a chart."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from jetway.tasks.passes import (
    InFlight,
    Power,
    PowerPass,
    dla_layers_ratio,
    provider_notes,
    read_series,
    trtexec_ratio,
)
from jetway.tasks.results import MEASURED_METRICS, TIMING_PREFIXES

SUMMARY = {"min": 0.8, "max": 2.0, "mean": 1.1, "median": 1.0, "p90": 1.2, "p95": 1.4, "p99": 1.8}
IN_FLIGHT = InFlight.model_validate(
    {
        "queries": 3000,
        "queries_per_s": 1000.0,
        "latency_ms": {**SUMMARY, "median": 1.5},
        "gpu_compute_ms": SUMMARY,
        "warnings": ["lock its clocks"],
        "settings": {"streams": 1},
    }
)


def test_queries_in_flight_have_names_of_their_own():
    metrics = IN_FLIGHT.metrics(batch_size=4)
    assert metrics == {
        "in_flight_samples_per_s": 4000.0,
        "in_flight_latency_ms_p50": 1.5,
        "in_flight_latency_ms_p99": 1.8,
        "in_flight_gpu_compute_ms_p50": 1.0,
    }
    assert set(metrics) <= set(MEASURED_METRICS)


def test_all_that_the_target_told_is_kept():
    assert IN_FLIGHT.model_dump()["settings"] == {"streams": 1}


POWER = {
    "total": "VDD_IN",
    "duration_s": 10.0,
    "inferences": 18000,
    "power_w_mean": 9.0,
    "power_w_peak": 11.0,
    "idle_power_w_mean": 4.0,
    "power_above_idle_w_mean": 5.0,
    "energy_mj_per_inference": 5.0,
    "energy_above_idle_mj_per_inference": 2.8,
    "inferences_per_joule": 200.0,
    "rails": {"VDD_IN": {"mean_w": 9.0, "peak_w": 11.0, "idle_w": 4.0, "above_idle_w": 5.0}},
    "reasons": [],
}


def test_power_has_the_names_of_the_stage_table():
    power = Power.model_validate(POWER)
    assert power.model_dump()["rails"]["VDD_IN"]["above_idle_w"] == 5.0
    assert set(power.metrics()) <= set(MEASURED_METRICS)
    assert power.metrics()["energy_mj_per_inference"] == 5.0


def test_doubtful_power_is_kept_and_not_stated():
    power = Power.model_validate(POWER | {"reasons": ["the GPU throttled"]})
    assert power.power_w_mean == 9.0
    assert set(power.metrics().values()) == {None}


def test_a_sum_of_rails_is_called_one():
    samples = {"sha256": "0" * 64, "size_bytes": 1}
    summed = POWER | {"total": "sum_of_rails"}
    found = PowerPass.model_validate({"variants": {"a": summed, "b": POWER}, "samples": samples})
    assert found.notes("a") == ["power figures are a sum of rails: this board measures no total"]
    assert found.notes("b") == []


def test_missing_power_says_why():
    samples = {"sha256": "0" * 64, "size_bytes": 1}
    found = PowerPass.model_validate(
        {
            "variants": {"a": POWER, "b": POWER | {"reasons": ["the GPU throttled"]}},
            "unmeasured": {"c": "it does not use the card"},
            "samples": samples,
        }
    )
    assert found.notes("a") == []
    assert found.notes("b") == ["no power figures: the GPU throttled"]
    assert found.notes("c") == ["no power figures: it does not use the card"]


def test_an_invalid_session_says_nothing_of_any_of_them():
    nothing = Power.model_validate(dict.fromkeys(Power.model_fields, None) | {"total": "gpu", "reasons": []})
    names = {*IN_FLIGHT.metrics(1), *nothing.metrics(), "trtexec_gpu_compute_ratio"}
    assert all(name.startswith(TIMING_PREFIXES) for name in names)


def test_trtexec_is_the_unit_of_its_ratio():
    assert trtexec_ratio(IN_FLIGHT, {"gpu_compute_ms": {"median": 0.8}}) == pytest.approx(1.25)
    assert trtexec_ratio(IN_FLIGHT, {"reason": "no trtexec"}) is None
    assert trtexec_ratio(None, {"gpu_compute_ms": {"median": 0.8}}) is None


def test_dla_share_counts_layers():
    placement = [{"layer": "a", "device": "DLA"}, {"layer": "b", "device": "GPU"}]
    assert dla_layers_ratio({"placement": placement}) == 0.5
    assert dla_layers_ratio({"placement": None}) is None
    assert dla_layers_ratio({}) is None
    # ONNX Runtime's counts operators by provider.
    assert dla_layers_ratio({"placement": {"CPUExecutionProvider": 12}}) is None


def test_kernels_on_another_provider_than_asked_for_are_told():
    asked = {"load_options": {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}}
    mixed = {"placement": {"CUDAExecutionProvider": 9, "CPUExecutionProvider": 3}}
    assert provider_notes(asked | mixed) == [
        "3 of 12 kernels ran on CPUExecutionProvider, not on CUDAExecutionProvider"
    ]
    assert provider_notes(asked | {"placement": {"CUDAExecutionProvider": 9}}) == []
    assert provider_notes({"placement": [{"device": "DLA"}]}) == provider_notes({}) == []


@pytest.mark.parametrize(("samples", "shown"), [(1000, 200), (150, 150), (1, 1), (0, 0)])
def test_a_series_is_thinned_out_for_a_chart(tmp_path, samples, shown):
    times = np.arange(samples, dtype=np.float64)
    save_file({"time_s": times, "power_w.VDD_IN": times * 2}, tmp_path / "series")
    found, columns = read_series(tmp_path / "series")
    assert len(found) == len(columns["power_w.VDD_IN"]) == shown
    assert columns["power_w.VDD_IN"] == [2 * time for time in found]
    if samples:
        assert (found[0], found[-1]) == (0, samples - 1)
