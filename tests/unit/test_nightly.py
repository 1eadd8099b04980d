"""What a night comes to: its exit code, its words, and what its policy promotes."""

import pytest

from jetway.tasks.artifacts import Engine
from jetway.tasks.comparison import ComparedMetric, ComparedRow
from jetway.tasks.metrics import Metric
from jetway.tasks.nightly import (
    NightResult,
    NightRow,
    Policy,
    may_be_promoted,
    night_figures,
    night_markdown,
    to_promote,
    why_not_promoted,
)
from jetway.tasks.passport_changes import passport_changes
from jetway.tasks.results import GateVerdict, Validity, VariantResult, Verdict
from jetway.tasks.tracking.registry import Champion
from jetway.tasks.verdict import Change

CHAMPION = Champion(model="digits.orin", version=3, run_id="c" * 32, variant="pruned-fp16", target="orin")
REGRESSED, SAME, IMPROVED, UNKNOWN = Change.REGRESSED, Change.SAME, Change.IMPROVED, Change.UNKNOWN


def candidate(*, valid=True, gate=Verdict.PASS):
    return VariantResult(
        variant="pruned-fp16", target="orin", precision="fp16", engine="tensorrt", board="a board",
        metrics={"latency_ms_p50": 1.0, "size_bytes": 1000.0, "top1": 0.9},
        intervals={"latency_ms_p50": (0.9, 1.1)},
        validity=Validity(valid=valid, reasons=() if valid else ("it throttled",)),
        gates=(GateVerdict(name="*: top1 >= 0.8", metric="top1", limit=0.8, value=0.9, verdict=gate),),
    )  # fmt: skip


def night_row(*changes, champion=CHAMPION, recipe="digits", **given):
    metrics = tuple(
        ComparedMetric(
            metric=f"metric {i}",
            before=1.0,
            after=1.2,
            change=change,
            reason="so it is" * (change is UNKNOWN),
        )
        for i, change in enumerate(changes)
    )
    compared = ComparedRow(variant="pruned-fp16", target="orin", simulated=False, metrics=metrics)
    values = {"recipe": recipe, "target": "orin", "target_class": "orin", "run_id": "a" * 32}
    return NightRow(
        **values, candidate=candidate(**given), champion=champion, compared=compared if champion else None
    )


def failed(exit_code=3):
    return NightRow(
        recipe="detector", target="nano", target_class="nano", error="it is away", error_exit_code=exit_code
    )


def result(*rows):
    return NightResult(run_id="f" * 32, rows=rows)


@pytest.mark.parametrize(
    ("rows", "exit_code", "red"),
    [
        ([night_row(SAME, IMPROVED)], 0, False),
        ([night_row(champion=None)], 0, False),
        ([night_row(SAME, UNKNOWN)], 5, False),
        ([night_row(SAME, valid=False)], 5, False),
        ([night_row(SAME, gate=Verdict.UNKNOWN)], 5, False),
        ([night_row(SAME, gate=Verdict.FAIL)], 1, True),
        ([night_row(SAME, REGRESSED, UNKNOWN)], 1, True),
        ([failed(), night_row(SAME)], 3, True),
        ([failed(), night_row(REGRESSED)], 1, True),
        ([night_row(UNKNOWN), failed(6)], 6, True),
        ([], 0, False),
    ],
)
def test_exit_code_is_that_of_the_worst(rows, exit_code, red):
    assert (result(*rows).exit_code, result(*rows).is_red) == (exit_code, red)


def test_message_lists_what_is_not_well_the_worst_first():
    night = result(
        night_row(SAME), night_row(UNKNOWN, recipe="b"), failed(), night_row(REGRESSED, SAME, recipe="a")
    )
    assert night.message == (
        "REGRESSED: a on orin (metric 0 1 → 1.2, +20.0%); FAILED: detector on nano (it is away); "
        "UNKNOWN: b on orin (metric 0: so it is)"
    )
    assert result(night_row(SAME)).message == "Nothing is worse than the champions."


@pytest.mark.parametrize(
    ("row", "never", "on_improvement", "by_hand"),
    [
        (night_row(champion=None), False, True, False),
        (night_row(champion=None, valid=False), False, False, False),
        (night_row(champion=None, gate=Verdict.FAIL), False, False, False),
        (night_row(SAME, IMPROVED), False, True, False),
        (night_row(SAME), False, False, False),
        (night_row(UNKNOWN, IMPROVED), False, False, False),
        (night_row(IMPROVED, gate=Verdict.UNKNOWN), False, False, False),
        (failed(), False, False, False),
    ],
)
def test_policy_promotes_what_is_sound_and_better(row, never, on_improvement, by_hand):
    promoted = [
        may_be_promoted(row, policy) for policy in (Policy.NEVER, Policy.ON_IMPROVEMENT, Policy.BY_HAND)
    ]
    assert promoted == [never, on_improvement, by_hand]


def board(name, row):
    """The row on another board of the class."""
    return row.model_copy(update={"target": name})


def test_boards_of_a_class_share_what_is_promoted():
    new, improved = night_row(champion=None), night_row(IMPROVED)
    rows = [board("a", new), board("b", new), board("a", improved.model_copy(update={"recipe": "other"}))]
    assert to_promote(rows, Policy.ON_IMPROVEMENT) == [rows[0], rows[2]]
    told = [rows[0].model_copy(update={"promoted": CHAMPION}), *rows[1:]]
    assert why_not_promoted(told[1], told, Policy.ON_IMPROVEMENT) == (
        "not promoted: digits on a was, and the class orin has one champion"
    )
    assert why_not_promoted(told[2], told, Policy.ON_IMPROVEMENT) == ""


@pytest.mark.parametrize(
    "other", [night_row(REGRESSED), night_row(UNKNOWN), night_row(SAME, gate=Verdict.FAIL), failed()]
)
def test_nothing_is_promoted_where_another_board_of_the_class_did_not_pass(other):
    other = board("b", other).model_copy(update={"recipe": "digits", "target_class": "orin"})
    rows = [board("a", night_row(IMPROVED)), other, board("c", night_row(SAME))]
    assert to_promote(rows, Policy.ON_IMPROVEMENT) == []
    assert to_promote([rows[0], rows[2]], Policy.ON_IMPROVEMENT) == [rows[0]]
    told = [why_not_promoted(row, rows, Policy.ON_IMPROVEMENT) for row in rows]
    assert told == [
        f"not promoted: the class orin has one champion, and digits on b is {other.status}", "", ""
    ]  # fmt: skip


def test_times_of_an_invalid_session_are_no_part_of_the_history():
    row = night_row(SAME).model_copy(update={"task_metrics": (Metric(name="top1"),)})
    known = {"size_bytes": 1000.0, "size_bytes.low": 1000.0, "size_bytes.high": 1000.0}
    score = {"top1": 0.9, "top1.low": 0.9, "top1.high": 0.9}
    times = {"latency_ms_p50": 1.0, "latency_ms_p50.low": 0.9, "latency_ms_p50.high": 1.1}
    assert night_figures(row) == known | times | score
    assert night_figures(row.model_copy(update={"candidate": candidate(valid=False)})) == known | score
    assert night_figures(failed()) == {}


def test_markdown_begins_with_the_worst():
    text = night_markdown([night_row(SAME), failed(), night_row(REGRESSED, UNKNOWN)])
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## REGRESSED: digits on orin",
        "## FAILED: detector on nano",
        "## SAME: digits on orin",
    ]
    assert "Against digits.orin version 3 (pruned-fp16 of run cccccccc)." in text
    assert "| metric 1 | 1 | 1.2 | +20.0% |  | UNKNOWN | so it is |" in text
    assert "- it is away" in text


def engine(target="orin", version="10.3"):
    platform = {"engine": "tensorrt", "engine_version": version}
    return Engine(sha256="0" * 64, size_bytes=1, metadata={"target": target, "platform": platform})


@pytest.mark.parametrize(
    ("rebuilt", "told"),
    [
        (engine(version="10.7"), "engine_version was 10.3 and is 10.7"),
        (engine(target="orin-2"), "it was built on orin"),
        (engine(), "its file was no longer on the target"),
    ],
)
def test_why_a_champion_was_built_anew(rebuilt, told):
    assert passport_changes(engine(), rebuilt) == told
