"""Gates: PASS, FAIL or UNKNOWN, and the exit code."""

import pytest

from jetway.configs.schema import Gate
from jetway.tasks.errors import ConfigError
from jetway.tasks.gates import check_gate_metrics, evaluate_gates, gates_exit_code, winner
from jetway.tasks.metrics import Metric
from jetway.tasks.results import Interval, Validity, VariantResult, Verdict, metric_names


def make_row(
    metrics: dict[str, float | None],
    intervals: dict[str, Interval] | None = None,
    *,
    variant: str = "pruned-int8-qat",
    validity: Validity = Validity(),  # noqa: B008
) -> VariantResult:
    return VariantResult(
        variant=variant,
        target="loopback",
        precision="int8-qat",
        engine="onnxruntime",
        board="a machine",
        metrics=metrics,
        intervals=intervals or {},
        validity=validity,
    )


def verdict_of(row: VariantResult, gate: str) -> Verdict:
    (judged,) = evaluate_gates([row], [Gate.model_validate(gate)])
    return judged.gates[0].verdict


@pytest.mark.parametrize(
    ("gate", "value", "interval", "expected"),
    [
        ("top1_drop <= 0.01", 0.004, None, Verdict.PASS),
        ("top1_drop <= 0.01", 0.010, None, Verdict.PASS),
        ("top1_drop <= 0.01", 0.011, None, Verdict.FAIL),
        ("top1_drop <= 0.01", 0.004, (-0.001, 0.009), Verdict.PASS),
        ("top1_drop <= 0.01", 0.004, (-0.001, 0.010), Verdict.PASS),
        ("top1_drop <= 0.01", 0.004, (-0.001, 0.012), Verdict.UNKNOWN),
        ("top1_drop <= 0.01", 0.020, (0.008, 0.030), Verdict.UNKNOWN),
        ("top1_drop <= 0.01", 0.020, (0.015, 0.030), Verdict.FAIL),
        ("top1_drop >= 0.01", 0.020, (0.015, 0.030), Verdict.PASS),
        ("top1_drop >= 0.01", 0.001, (-0.005, 0.009), Verdict.FAIL),
        ("top1_drop <= 0.01", None, None, Verdict.UNKNOWN),
    ],
)
def test_evaluate_gates_decides_by_the_interval(
    gate: str, value: float | None, interval: Interval | None, expected: Verdict
) -> None:
    row = make_row({"top1_drop": value}, {"top1_drop": interval} if interval else {})
    assert verdict_of(row, gate) is expected


def test_evaluate_gates_applies_a_glob_to_matching_variants_only() -> None:
    rows = [make_row({"size_ratio": 1.0}, variant=name) for name in ("baseline-fp32", "pruned-fp32")]
    judged = evaluate_gates(rows, [Gate.model_validate("pruned-*: size_ratio <= 0.5")])
    assert [len(row.gates) for row in judged] == [0, 1]
    assert judged[1].gates[0].name == "pruned-*: size_ratio <= 0.5"


def test_evaluate_gates_calls_the_times_of_an_invalid_session_unknown_not_slow() -> None:
    row = make_row(
        {"latency_ms_p50": 9.0, "size_ratio": 0.9}, validity=Validity(valid=False, reasons=("drift",))
    )
    assert verdict_of(row, "latency_ms_p50 <= 5") is Verdict.UNKNOWN
    assert verdict_of(row, "latency_ms_p50 <= 50") is Verdict.UNKNOWN
    assert verdict_of(row, "size_ratio <= 0.5") is Verdict.FAIL


def test_evaluate_gates_refuses_a_metric_that_no_row_has() -> None:
    with pytest.raises(ConfigError, match=r"no metric 'top1_dorp'.*Did you mean 'top1_drop'.*size_ratio"):
        evaluate_gates(
            [make_row({"top1_drop": 0.0, "size_ratio": 1.0})], [Gate.model_validate("top1_dorp <= 1")]
        )


@pytest.mark.parametrize(
    ("gates", "valid", "expected"),
    [
        ([], True, 0),
        ([], False, 5),
        (["top1 >= 0.9"], True, 0),
        (["top1 >= 0.9"], False, 5),
        (["top1 >= 0.9", "top1_drop <= 0.01"], True, 5),
        (["top1 >= 0.99", "top1_drop <= 0.01"], False, 1),
    ],
)
def test_gates_exit_code_is_fail_before_unknown_before_pass(
    gates: list[str], valid: bool, expected: int
) -> None:
    row = make_row({"top1": 0.95, "top1_drop": 0.0}, {"top1_drop": (-0.02, 0.02)})
    row = row.model_copy(update={"validity": Validity(valid=valid)})
    assert gates_exit_code(evaluate_gates([row], [Gate.model_validate(gate) for gate in gates])) == expected


def test_check_gate_metrics_accepts_every_name_that_a_row_can_have() -> None:
    known = metric_names([Metric(name="miou")])
    gates = [Gate.model_validate(f"{name} <= 1") for name in known]
    check_gate_metrics(gates, known, ["baseline-fp32"])
    assert {"miou", "miou_drop", "latency_p50_ratio", "size_bytes"} <= set(known)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("latency_p99 <= 4", "latency_ms_p99"),
        ("top1_drop <= 4", "miou_drop"),
        ("quantized-*: miou >= 0.5", "baseline-fp32, pruned-fp32"),
    ],
)
def test_check_gate_metrics_names_what_there_is(gate: str, message: str) -> None:
    known = metric_names([Metric(name="miou")])
    with pytest.raises(ConfigError, match=message):
        check_gate_metrics([Gate.model_validate(gate)], known, ["baseline-fp32", "pruned-fp32"])


def judged(variant: str, latency_ms: float | None, *, size_ratio: float = 0.5) -> VariantResult:
    row = make_row({"latency_ms_p50": latency_ms, "size_ratio": size_ratio}, variant=variant)
    return evaluate_gates([row], [Gate.model_validate("size_ratio <= 1")])[0]


def test_winner_is_the_fastest_that_failed_no_gate() -> None:
    baseline, pruned = judged("baseline-fp32", 1.0), judged("pruned-fp32", 3.0)
    quantized, unmeasured = judged("pruned-int8-qat", 2.0), judged("pruned-int8-ptq", None)
    failed = judged("baseline-int8-ptq", 0.5, size_ratio=2.0)
    assert winner([baseline, pruned, unmeasured, quantized, failed]) == quantized
    assert winner([unmeasured, pruned]) == pruned
    assert winner([failed, baseline]) == baseline
    assert winner([failed]) is None
