"""The stage table on the terminal, in Markdown and as JSON."""

import io
import json

import pytest
from rich.console import Console

from jetway.configs.schema import Gate
from jetway.tasks.compare import derive_metrics
from jetway.tasks.gates import evaluate_gates
from jetway.tasks.metrics import Metric
from jetway.tasks.results import Validity, VariantResult, dump_rows, load_rows
from jetway.tasks.table import (
    human_bytes,
    human_count,
    run_json,
    stage_table,
    stage_table_markdown,
    table_notes,
)

METRICS = (Metric(name="top1"), Metric(name="loss", higher_is_better=False))
VARIANTS = {"baseline-fp32": 1.0, "pruned-fp32": 0.5, "pruned-int8-ptq": 0.14, "pruned-int8-qat": 0.13}


def make_rows(*targets: str) -> list[VariantResult]:
    rows = [make_row(name, target, share) for target in targets for name, share in VARIANTS.items()]
    gates = [Gate.model_validate("pruned-*: latency_p50_ratio <= 0.3")]
    return evaluate_gates(derive_metrics(rows, METRICS), gates)


def make_row(variant: str, target: str, share: float) -> VariantResult:
    stage, _, precision = variant.partition("-")
    return VariantResult(
        variant=variant,
        target=target,
        precision=precision,
        engine="onnxruntime 1.31",
        board="AMD EPYC 9R14 (2 cores, VNNI)",
        metrics={
            "params": 1_234_567 * (1.0 if stage == "baseline" else 0.5),
            "macs": 345.6e6 * (1.0 if stage == "baseline" else 0.5),
            "size_bytes": 4.9e6 * share,
            "latency_ms_p50": 4.567 * share,
            "latency_ms_p90": 4.8 * share,
            "latency_ms_p99": 5.31 * share,
            "throughput_samples_per_s": 212 / share,
            "peak_memory_mib": None,
            "top1": 0.9777 - 0.004 * (1 - share),
            "loss": 0.1,
        },
        intervals={"latency_p50_ratio": (share * 0.97, share * 1.03)},
        validity=Validity(valid=share != 0.14, reasons=() if share != 0.14 else ("drifted 22 %",)),
    )


def render(rows: list[VariantResult], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(stage_table(rows, METRICS, width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_stage_table_cuts_no_cell_at_usual_widths(width: int) -> None:
    text = render(make_rows("loopback", "orin-nano"), width)
    assert "…" not in text
    for shown in (*VARIANTS, "4.57", "[0.126, 0.134]", "x0.130", "drop 0.003", "UNKNOWN 1/1", "4.9 MB"):
        assert shown in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_stage_table_shows_every_figure_at_120_columns() -> None:
    header = render(make_rows("loopback"), 120).splitlines()[1]
    for title in (
        "params",
        "MACs",
        "size",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "samples/s",
        "MiB",
        "top1",
        "valid",
    ):
        assert title in header


def test_stage_table_groups_targets_under_their_machine() -> None:
    text = render(make_rows("loopback", "orin"), 120)
    first, second = (
        text.index("loopback: onnxruntime 1.31 on AMD"),
        text.index("orin: onnxruntime 1.31 on AMD"),
    )
    assert first < text.index("baseline-fp32") < second
    assert text.count("baseline-fp32") == 2


def test_stage_table_marks_what_was_not_measured() -> None:
    line = next(line for line in render(make_rows("loopback"), 120).splitlines() if "baseline-fp32" in line)
    assert " - " in line


def test_columns_of_a_pass_appear_with_its_figures() -> None:
    rows = make_rows("orin")
    assert " mJ " not in render(rows, 160)
    power = {"power_w_mean": 9.87, "energy_mj_per_inference": 12.3, "in_flight_samples_per_s": 4321.0}
    rows[1] = rows[1].model_copy(update={"metrics": rows[1].metrics | power})
    for text in (render(rows, 160), stage_table_markdown(rows, METRICS)):
        for shown in ("in flight/s", "W", "mJ", "9.87", "12.3", "4,321"):
            assert shown in text


def test_a_simulated_row_says_so() -> None:
    rows = [row.model_copy(update={"simulated": True}) for row in make_rows("nano")]
    for text in (render(rows, 120), stage_table_markdown(rows, METRICS)):
        assert text.count("simulated") == len(rows)
        assert "NO, simulated" in text
    assert "simulated" not in render(make_rows("nano"), 120)


def test_a_table_names_every_engine_of_its_target() -> None:
    rows = make_rows("orin")
    rows[1] = rows[1].model_copy(update={"engine": "tensorrt"})
    assert "orin: onnxruntime 1.31, tensorrt on AMD" in render(rows, 120)


def test_table_notes_name_invalid_measurements_and_missed_gates() -> None:
    notes = table_notes(make_rows("loopback"))
    assert "pruned-int8-ptq on loopback: INVALID measurement: drifted 22 %" in notes
    assert any(
        n.startswith("pruned-fp32 on loopback: gate FAIL") and "measured 0.5 [0.485, 0.515]" in n
        for n in notes
    )
    assert not any("pruned-int8-qat" in note for note in notes)


def test_what_holds_for_a_whole_session_is_said_once() -> None:
    disturbed = Validity(valid=False, reasons=("other processes held the CPU",))
    rows = [row.model_copy(update={"validity": disturbed, "gates": ()}) for row in make_rows("orin")]
    assert table_notes(rows) == [
        f"{', '.join(VARIANTS)} on orin: INVALID measurement: other processes held the CPU"
    ]


def test_notes_of_a_row_are_printed() -> None:
    rows = make_rows("orin")
    rows[1] = rows[1].model_copy(update={"notes": ("no power figures: the GPU throttled",)})
    assert "pruned-fp32 on orin: no power figures: the GPU throttled" in table_notes(rows)


def test_stage_table_markdown_has_as_many_cells_in_every_row() -> None:
    lines = [line for line in stage_table_markdown(make_rows("a", "b"), METRICS).splitlines() if "|" in line]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 * (2 + len(VARIANTS))


def test_stage_table_markdown_escapes_bars() -> None:
    rows = [row.model_copy(update={"variant": "a|b"}) for row in make_rows("a")[:1]]
    assert "| a\\|b |" in stage_table_markdown(rows, METRICS)


def test_run_json_is_the_object_of_the_command_line() -> None:
    rows = make_rows("loopback")
    document = json.loads(json.dumps(run_json("r1", "FINISHED", 1, [("prune", 1.23456, True)], 2.0, rows)))
    assert document["stages"] == [{"name": "prune", "seconds": 1.235, "cached": True}]
    assert (document["run_id"], document["status"], document["exit_code"]) == ("r1", "FINISHED", 1)
    fp32 = document["variants"][1]
    assert {"variant", "target", "precision", "metrics", "validity", "gates"} <= set(fp32)
    (gate,) = fp32["gates"]
    assert (gate["limit"], gate["value"], gate["passed"], gate["verdict"]) == (0.3, 0.5, False, "FAIL")
    assert document["variants"][2]["validity"] == {"valid": False, "reasons": ["drifted 22 %"]}


def test_rows_survive_json() -> None:
    rows = make_rows("loopback")
    loaded, metrics = load_rows(json.loads(json.dumps(dump_rows(rows, METRICS))))
    assert (loaded, tuple(metrics)) == (rows, METRICS)


@pytest.mark.parametrize(
    ("value", "count", "size"),
    [
        (None, "-", "-"),
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (999.7, "1 k", "1 kB"),
        (1_234_567, "1.23 M", "1.23 MB"),
        (9.996e8, "1 G", "1 GB"),
        (2.5e15, "2.5e+03 T", "2.5e+03 TB"),
    ],
)
def test_human_units(value: float | None, count: str, size: str) -> None:
    assert (human_count(value), human_bytes(value)) == (count, size)
