from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jetway.configs.schema import BenchmarkConfig, BuildConfig
from jetway.tasks.benchmark import benchmark_engines
from jetway.tasks.build import build_engine
from jetway.tasks.canary import canary_inputs, canary_onnx
from jetway.tasks.errors import ArtifactError
from jetway.tasks.measurement import BenchmarkResult
from jetway.tasks.passes import read_series

pytestmark = pytest.mark.serial

CONFIG = BenchmarkConfig(min_queries=664, min_duration_s=1.0, slice_s=0.05)


@pytest.fixture(scope="module")
def engines(deployed):
    """The same engine under two names: what differs between them is noise."""
    engine = build_engine(deployed.context, deployed.session, deployed.onnx, BuildConfig())
    return {"baseline-fp32": engine, "pruned-fp32": engine}


@pytest.fixture(scope="module")
def result(deployed, engines):
    return benchmark_engines(deployed.context, deployed.session, engines, CONFIG)


def test_two_variants_of_one_engine_are_equally_fast(result):
    ratio = result.variants["pruned-fp32"].p50_ratio
    assert ratio.value == pytest.approx(1.0, abs=0.08)
    assert ratio.interval[0] <= ratio.value <= ratio.interval[1]
    assert result.variants["baseline-fp32"].p50_ratio.value == 1.0


def test_each_variant_has_its_figures(result):
    for measured in result.variants.values():
        latency = measured.latency
        assert latency.p50_ms <= latency.p90_ms <= latency.p95_ms <= latency.p99_ms
        assert latency.count >= 664
        assert measured.throughput_samples_per_s == pytest.approx(1000 / latency.mean_ms)
        assert measured.peak_memory_mib > measured.engine_memory_mib > 0
        assert set(measured.intervals()) == {
            "latency_ms_p50", "latency_ms_p90", "latency_ms_p95", "latency_ms_p99", "latency_p50_ratio",
        }  # fmt: skip
        assert set(measured.intervals()) < set(measured.metrics())


def test_every_query_is_kept(deployed, engines, result):
    samples = load_file(deployed.context.store.open(result.samples))
    assert {name.partition(".")[0] for name in samples} == {*engines, "canary"}
    for name in engines:
        counted = ~np.isin(samples[f"{name}.round"], result.excluded_rounds)
        assert counted.sum() == result.variants[name].latency.count


def test_the_sensors_of_the_session_are_kept(deployed, result):
    times_s, columns = read_series(deployed.context.store.open(result.telemetry.samples))
    assert times_s == sorted(times_s)
    assert all(len(values) == len(times_s) for values in columns.values())
    assert max(columns["memory_used_mib"]) > 0
    assert result.telemetry.summary["samples"] >= len(times_s)


def test_a_real_machine_is_not_simulated(result):
    assert result.simulated is False
    assert result.in_flight == {}
    assert result.power is None


def test_notes_tell_what_a_board_was_left_with(result):
    left = result.model_copy(update={"power_mode": {"asked": "15W", "restored": "sudo asks for a password"}})
    assert "not as before: sudo asks" in left.notes("baseline-fp32")[-1]
    back = result.model_copy(update={"power_mode": {"asked": "15W", "restored": True}})
    assert not any("as before" in note for note in back.notes("baseline-fp32"))


def test_notes_tell_what_was_asked_for_and_is_missing(result):
    failed = result.model_copy(update={"trtexec": {"baseline-fp32": {"failed": "exit status 1"}}})
    assert failed.notes("baseline-fp32")[0] == "no cross-check, trtexec failed: exit status 1"
    assert failed.metrics("baseline-fp32")["trtexec_gpu_compute_ratio"] is None


def test_notes_tell_which_passes_an_engine_cannot_take(result):
    some = result.model_copy(update={"left_out": {"baseline-fp32": ("throughput",)}})
    assert some.notes("baseline-fp32")[0] == "no throughput: for TensorRT engines alone"
    assert not any("TensorRT" in note for note in result.notes("baseline-fp32"))


def test_the_result_is_json(result):
    assert BenchmarkResult.model_validate_json(result.model_dump_json()) == result


def test_a_corrupt_engine_is_refused(deployed, engines):
    path = Path(engines["baseline-fp32"].metadata["remote_path"])
    sound = path.read_bytes()
    path.write_bytes(b"\0" + sound[1:])
    with pytest.raises(ArtifactError, match="corrupt"):
        benchmark_engines(deployed.context, deployed.session, engines, CONFIG)
    path.write_bytes(sound)


def test_the_canary_is_the_same_everywhere(deployed):
    """Its digest is part of what sessions of different days are compared by."""
    store = deployed.context.store
    assert canary_onnx(store) == canary_onnx(store)
    assert canary_inputs(store) == canary_inputs(store)
    assert canary_onnx(store).size_bytes == pytest.approx(3 * 32 * 32 * 9 * 4, rel=0.02)
