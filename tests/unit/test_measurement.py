import numpy as np
import pytest
from safetensors.numpy import save_file

from jetway.tasks.measurement import LatencySummary, measure_variants, read_samples
from jetway.tasks.results import MEASURED_METRICS, RATIO_METRICS


def summary(count):
    latencies = np.arange(1, count + 1, dtype=np.int64) * 1_000_000
    return LatencySummary.of(latencies, np.arange(count, dtype=np.int32) // 10)


@pytest.mark.parametrize(
    ("count", "stated"),
    [(10, {"p50"}), (63, {"p50"}), (64, {"p50", "p90"}), (661, {"p50", "p90", "p95"}),
     (662, {"p50", "p90", "p95", "p99"})],
)  # fmt: skip
def test_a_percentile_without_evidence_is_none(count, stated):
    found = summary(count)
    values = {name: getattr(found, f"{name}_ms") for name in ("p50", "p90", "p95", "p99")}
    assert {name for name, value in values.items() if value is not None} == stated
    assert set(found.intervals_ms) == stated


def test_latencies_are_in_milliseconds():
    found = summary(100)
    assert (found.p50_ms, found.p90_ms) == (50.0, 90.0)
    assert found.mean_ms == pytest.approx(50.5)
    assert found.stdev_ms == pytest.approx(np.std(np.arange(1, 101), ddof=1))
    assert found.timed_s == pytest.approx(5.05)


def measured(samples, **options):
    names = tuple(samples)
    return measure_variants(
        samples,
        names,
        memory={name: {"peak": 60.0, "engine": 12.0} for name in names},
        drift_ratios=dict.fromkeys(names, 0.01),
        seed=0,
        **options,
    )


@pytest.fixture
def samples():
    rounds = np.repeat(np.arange(20, dtype=np.int32), 10)
    slow = np.random.default_rng(0).integers(4_000_000, 5_000_000, 200)
    return {"baseline-fp32": (slow, rounds), "pruned-int8-qat": (slow // 4, rounds)}


def test_ratios_refer_to_the_first_variant(samples):
    found = measured(samples, batch_size=1)
    assert found["baseline-fp32"].p50_ratio.interval == (1.0, 1.0)
    assert found["pruned-int8-qat"].p50_ratio.value == pytest.approx(0.25, rel=1e-3)


def test_throughput_counts_the_samples_of_a_batch(samples):
    one, eight = measured(samples, batch_size=1), measured(samples, batch_size=8)
    rate = one["baseline-fp32"].throughput_samples_per_s
    assert rate == pytest.approx(1000 / one["baseline-fp32"].latency.mean_ms)
    assert eight["baseline-fp32"].throughput_samples_per_s == pytest.approx(8 * rate)


def test_metrics_have_the_names_of_the_stage_table(samples):
    names = set(measured(samples, batch_size=1)["baseline-fp32"].metrics())
    assert names <= {*MEASURED_METRICS, *RATIO_METRICS}


def test_excluded_rounds_are_left_out(tmp_path):
    save_file(
        {"a.latency_ns": np.arange(6), "a.round": np.array([0, 0, 1, 1, 2, 2], dtype=np.int32)},
        tmp_path / "samples",
    )
    latencies, rounds = read_samples(tmp_path / "samples", ("a",), (1,))["a"]
    assert latencies.tolist() == [0, 1, 4, 5]
    assert rounds.tolist() == [0, 0, 2, 2]
