"""The deployed checklists' judgements: each on evidence that passes and on evidence that does not."""

import pytest

from jetway.configs.schema import Gate, Recipe, Target
from jetway.flows.__main__ import main
from jetway.tasks.artifacts import Engine, Tensors
from jetway.tasks.checks import Outcome
from jetway.tasks.deployed import (
    accuracy_check,
    camera_check,
    engine_file_check,
    fit_check,
    frame_rate_check,
    gates_check,
    growth_check,
    latency_check,
    memory_check,
    no_soak_checks,
    onnx_check,
    passport_check,
    rate_check,
    soak_checks,
    temperature_check,
)
from jetway.tasks.deployment import Deployment, find_deployment, latest_run
from jetway.tasks.errors import TrackingError
from jetway.tasks.measurement import BenchmarkResult, LatencySummary
from jetway.tasks.results import GateVerdict, Validity, VariantResult, Verdict
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import RunRecord

PASS, FAIL, SKIPPED = Outcome.PASS, Outcome.FAIL, Outcome.SKIPPED
VARIANT = "pruned-fp32"
PLATFORM = {"engine": "onnxruntime", "engine_version": "1.20.0", "architecture": "aarch64"}
PASSPORT = {"platform": PLATFORM, "threads": 1, "engine_sha256": "a" * 64}
ENGINE = Engine(
    sha256="a" * 64, size_bytes=9,
    metadata={
        **PASSPORT, "remote_path": "/work/e.engine", "reused": False, "target": "orin",
        "provenance": {"metadata": {"precision": "fp32", "opset": 17}},
    },
)  # fmt: skip
FILE = {
    "sha256": "a" * 64, "size_bytes": 9, "platform": PLATFORM, "reason": "",
    "passport": {**PASSPORT, "provenance": ENGINE.metadata["provenance"]},
}  # fmt: skip
GATE = {"name": "g", "metric": "top1", "limit": 0.9, "value": 0.8}


def row(**changes):
    values = {
        "variant": VARIANT, "target": "orin", "precision": "fp32", "engine": "onnxruntime", "board": "a board",
        "metrics": {"latency_ms_p50": 2.0, "peak_memory_mib": 100.0}, "intervals": {"latency_ms_p50": (1.9, 2.1)},
    }  # fmt: skip
    return VariantResult.model_validate({**values, **changes})


def deployment(metrics=None, **changes):
    run = RunRecord(
        run_id="r" * 32, name="", experiment="mine", status="FINISHED", started_ms=0, params={}, tags={},
        metrics=metrics or {},
    )  # fmt: skip
    return Deployment(run, "orin", row(**changes), ENGINE, [], 1.0)


def gate(verdict):
    return GateVerdict(**GATE, verdict=verdict)


INVALID = {"valid": False, "reasons": ["it was hot"]}


@pytest.mark.parametrize(
    ("check", "verdict", "evidence"),
    [
        (gates_check(row(gates=(gate(Verdict.PASS),))), PASS, "1 of 1 gates passed"),
        (gates_check(row(gates=(gate(Verdict.PASS), gate(Verdict.UNKNOWN)))), FAIL, "gate not passed: g"),
        (gates_check(row(gates=())), PASS, "it has no gates"),
        (gates_check(row(validity=INVALID)), FAIL, "INVALID measurement: it was hot"),
        (onnx_check(deployment({"pruned-fp32.verify.parity_excess": 0.5})), PASS, "fp32, opset 17; its error is 0.5"),
        (onnx_check(deployment({"pruned-fp32.ort.verify.parity_excess": 1.5})), FAIL, "1.5 of what"),
        (onnx_check(deployment({"pruned-fp32-on-tensorrt.verify.parity_excess": 0.5})), FAIL, "no record"),
        (engine_file_check(ENGINE, FILE), PASS, "as recorded"),
        (engine_file_check(ENGINE, {**FILE, "sha256": "b" * 64}), FAIL, "corrupt: sha256 bbbbbbbbbbbb"),
        (engine_file_check(ENGINE, {**FILE, "sha256": None}), FAIL, "no longer on the target"),
        (passport_check(ENGINE, FILE), PASS, "as recorded"),
        (passport_check(ENGINE, {**FILE, "passport": {**PASSPORT, "threads": 2, "x": 1}}), FAIL,
         "in: provenance, threads, x"),
        (passport_check(ENGINE, {**FILE, "passport": None}), FAIL, "none to read"),
        (fit_check(ENGINE, FILE), PASS, "onnxruntime 1.20.0 on aarch64"),
        (fit_check(ENGINE, {**FILE, "platform": {**PLATFORM, "engine_version": "1.21.0"}}), FAIL,
         "engine_version is 1.21.0, was 1.20.0"),
        (fit_check(ENGINE, {**FILE, "platform": None, "reason": "no tensorrt"}), FAIL, "no tensorrt"),
        (memory_check(row(), Target(name="orin", min_free_memory_mib=50), 150.0), PASS, "50 MiB left"),
        (memory_check(row(), Target(name="orin", min_free_memory_mib=51), 150.0), FAIL, "51 asked for"),
        (memory_check(row(metrics={}), Target(name="orin"), 150.0), SKIPPED, "not known"),
        (camera_check([]), SKIPPED, "sees none"),
        (camera_check(["imx219"]), SKIPPED, "sees: imx219"),
    ],
)  # fmt: skip
def test_what_is_deployed_is_judged_with_its_evidence(check, verdict, evidence):
    assert check.verdict is verdict
    assert evidence in check.evidence


def test_accuracy_is_compared_on_the_same_samples(small_workload):
    workload = small_workload()
    recorded = [{"top1": value} for value in (1.0, 0.0, 1.0, 1.0)]
    same = accuracy_check(workload, recorded, recorded[:2])
    assert (same.verdict, same.evidence) == (PASS, "top1 0.5, recorded 0.5, on 2 samples")
    other = accuracy_check(workload, recorded, [{"top1": 1.0}, {"top1": 1.0}])
    assert (other.verdict, other.evidence) == (FAIL, "top1 1, recorded 0.5, on 2 samples")


def session(p50_ms, *, canary_ms=1.0, half_width_ms=0.05, reasons=()):
    """A benchmark's result with no more than the check reads."""
    latency = LatencySummary(
        count=1000, timed_s=2.0, mean_ms=p50_ms, stdev_ms=0.1, p50_ms=p50_ms, p90_ms=None, p95_ms=None, p99_ms=None,
        intervals_ms={"p50": (p50_ms - half_width_ms, p50_ms + half_width_ms)},
    )  # fmt: skip
    canary = latency.model_copy(update={"p50_ms": canary_ms})
    variant = {
        "variant": VARIANT, "latency": latency, "throughput_samples_per_s": 500.0, "peak_memory_mib": None,
        "engine_memory_mib": None, "drift_ratio": 0.0, "p50_ratio": {"value": 1.0, "interval": (1.0, 1.0)},
    }  # fmt: skip
    state = {
        "load_average": (0, 0, 0), "frequencies_mhz": {}, "throttle_events": None, "stolen_ms": None,
        "temperatures_c": {}, "memory_available_mib": None,
    }  # fmt: skip
    return BenchmarkResult(
        target="orin", variants={VARIANT: variant}, validity=Validity(valid=not reasons, reasons=reasons),
        samples=Tensors(sha256="c" * 64, size_bytes=1), canary=canary, canary_drift_ratio=0.0, rounds=12,
        excluded_rounds=(), extensions=0, slice_s=0.1, seed=0, machine_before=state, machine_after=state, boot_id="b",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("now", "verdict", "evidence"),
    [
        (session(2.0), PASS, "p50 2 ms [1.95, 2.05], recorded 2 [1.9, 2.1], up to 2.31 allowed"),
        (session(1.0), PASS, "p50 1 ms"),
        (session(2.35), PASS, "p50 2.35 ms"),
        (session(2.4), FAIL, "p50 2.4 ms [2.35, 2.45]"),
        (session(2.4), FAIL, "1.20 times as long, the canary 1.00 times: the engine is slower"),
        (
            session(3.2, canary_ms=1.5),
            FAIL,
            "1.60 times as long, the canary 1.50 times: the machine is slower",
        ),
        (session(2.0, reasons=("it was hot",)), FAIL, "INVALID, check again: it was hot"),
    ],
)
def test_latency_may_not_be_beyond_its_recorded_interval(now, verdict, evidence):
    check = latency_check(deployment(), now, 0.1)
    assert check.verdict is verdict
    assert evidence in check.evidence


@pytest.mark.parametrize(
    ("gates", "metrics", "verdict", "evidence"),
    [
        ([], {"throughput_samples_per_s": 30.0}, PASS, "the checklist's own limit"),
        ([], {"throughput_samples_per_s": 29.9}, FAIL, ">= 30 asked for"),
        (["pruned-*: latency_ms_p50 <= 50"], {"latency_ms_p50": 40.0, "throughput_samples_per_s": 25.0}, PASS,
         "latency_ms_p50 40, <= 50 asked for (the recipe's gates)"),
        (["latency_ms_p99 <= 5"], {"latency_ms_p99": None}, FAIL, "latency_ms_p99 not measured"),
        (["throughput_samples_per_s >= 12"], {"throughput_samples_per_s": 12.5}, PASS, ">= 12"),
        (["baseline-*: latency_ms_p50 <= 1", "latency_p50_ratio <= 0.3"], {"throughput_samples_per_s": 99.0}, PASS,
         "own limit"),
    ],
)  # fmt: skip
def test_real_time_is_the_recipes_gate_or_thirty_a_second(gates, metrics, verdict, evidence):
    check = rate_check(VARIANT, [Gate.model_validate(text) for text in gates], metrics)
    assert check.verdict is verdict
    assert evidence in check.evidence


def windows(count=9, **columns):
    """A column is a number for all windows, or a function of the window's share of the soak."""
    base = {"queries_per_s": 100.0, "waiting_ratio": 0.0, "temperature_c": 50.0, "process_memory_mib": 100.0,
            "device_memory_mib": None}  # fmt: skip
    found = []
    for index in range(count):
        share = index / (count - 1)
        values = {key: value(share) if callable(value) else value for key, value in (base | columns).items()}
        found.append({**values, "start_s": 10.0 * index, "end_s": 10.0 * index + 10})
    return found


@pytest.mark.parametrize(
    ("given", "verdict", "evidence"),
    [
        (windows(), PASS, "200 samples/s in the first third, 200 in the last: -0.0%"),
        (windows(queries_per_s=lambda t: 100 - 10 * t), PASS, "a loss of 10% is allowed"),
        (windows(queries_per_s=lambda t: 100 - 20 * t), FAIL, "-15.4%"),
        (windows(queries_per_s=lambda t: 50 + 100 * t), PASS, "+"),
        (windows(waiting_ratio=lambda t: 0.3 if t > 0.4 else 0.1), FAIL, "only 4 of 9 windows"),
        (windows(count=5), FAIL, "6 are needed"),
    ],
)
def test_a_frame_rate_may_not_fall_during_a_soak(given, verdict, evidence):
    check = frame_rate_check(given, 0.1, batch_size=2)
    assert check.verdict is verdict
    assert evidence in check.evidence


@pytest.mark.parametrize(
    ("check", "verdict", "evidence"),
    [
        (temperature_check(windows()), PASS, "hottest zone 50.0 °C, 60 allowed; +0.0 °C"),
        (temperature_check(windows(temperature_c=lambda t: 61.0 if t == 0.5 else 50.0)), FAIL, "61.0 °C"),
        (temperature_check(windows(temperature_c=lambda t: 40 + 20 * t)), FAIL, "+15.0 °C"),
        (temperature_check(windows(temperature_c=None)), SKIPPED, "too few temperatures"),
        (growth_check(windows()), PASS, "process 100.0 MiB, +0.0 MiB of 8.0 allowed"),
        (growth_check(windows(process_memory_mib=lambda t: 100 + 20 * t)), FAIL, "+15.0 MiB"),
        (growth_check(windows(process_memory_mib=lambda t: 1000 + 20 * t)), PASS, "of 50.1 allowed"),
        (growth_check(windows(device_memory_mib=lambda t: 500 + 100 * t)), FAIL, "GPU 512.5 MiB, +75.0"),
        (growth_check(windows(count=3)), SKIPPED, "soak longer"),
    ],
)
def test_a_soak_may_neither_heat_nor_grow(check, verdict, evidence):
    assert check.verdict is verdict
    assert evidence in check.evidence


def recipe():
    return Recipe(name="mine", workload={"class_path": "a:B"}, variants=("baseline-fp32",))


def test_a_machine_that_was_not_itself_fails_the_soak():
    *_, machine = soak_checks({"windows": windows(), "reasons": ["the GPU was slowed down"]}, recipe(), 1)
    assert (machine.verdict, machine.evidence) == (FAIL, "the GPU was slowed down")
    checks = list(soak_checks({"windows": windows(), "reasons": []}, recipe(), 1))
    assert [check.verdict for check in checks] == [PASS] * 4
    assert [check.name for check in no_soak_checks()] == [check.name for check in checks]


@pytest.fixture
def tracker():
    return Tracker()


def finished_run(tracker, target, status="FINISHED", **tags):
    run_id = tracker.start_run("mine", {}, {"target": target, **tags})
    tracker.finish(run_id, status)
    return run_id


def test_the_newest_finished_run_on_the_target_counts(tracker):
    on_both = finished_run(tracker, "orin, nano")
    on_nano = finished_run(tracker, "nano")
    finished_run(tracker, "nano", "FAILED")
    assert latest_run(tracker, "mine", "orin").run_id == on_both
    assert latest_run(tracker, "mine", "nano").run_id == on_nano
    with pytest.raises(
        TrackingError, match=r"No finished run of the recipe 'other' on nano.*jetway run other"
    ):
        latest_run(tracker, "other", "nano")
    with pytest.raises(TrackingError, match=r"deployed nothing: every variant failed a gate"):
        find_deployment(tracker, "mine", "nano")


def test_a_soak_wants_a_deployment_and_minutes(capsys):
    assert main(["check", "digits", "--soak", "1"]) == 2
    assert "--deployed" in capsys.readouterr().err
    for minutes in ("0", "-1", "ten", "nan", "1e9"):
        with pytest.raises(SystemExit):
            main(["check", "digits", "--deployed", f"--soak={minutes}"])
        assert "no number of minutes" in capsys.readouterr().err
