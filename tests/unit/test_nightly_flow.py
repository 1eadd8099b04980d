"""Parts of the nightly flow that need neither a target nor a server."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from doubles.finished_night import make_candidate, make_compared

from jetway.configs.schema import Target
from jetway.flows.contest import Contest
from jetway.flows.nightly import Candidate, ended, read_orders
from jetway.flows.promote import rows_to_promote
from jetway.flows.publish import artifact_key, event_name
from jetway.flows.record import RunResult
from jetway.tasks.comparison import ComparedMetric
from jetway.tasks.errors import ConfigError, StageError, TrackingError
from jetway.tasks.nightly import NightResult, NightRow
from jetway.tasks.results import GateVerdict, TargetOutcome, TargetStatus, Verdict
from jetway.tasks.tracking.registry import Champion
from jetway.tasks.verdict import Change

BENCH = Target(name="bench", host="bench", labels={"class": "orin-nx"})
AWAY = TargetOutcome(name="bench", status=TargetStatus.FAILED, error="bench: no answer", exit_code=3)


def stored(*rows, targets=()):
    result = RunResult(run_id="a" * 32, exit_code=0, rows=rows, targets=targets, task_metrics=())
    return SimpleNamespace(run_id="a" * 32, result=result)


def row(variant="pruned-fp32", *, target="bench", latency_ms=1.0, verdict=Verdict.PASS):
    gate = GateVerdict(name="a gate", metric="top1", limit=1.0, value=1.0, verdict=verdict)
    made = make_candidate(variant=variant).model_copy(update={"target": target, "gates": (gate,)})
    return made.model_copy(update={"metrics": {"latency_ms_p50": latency_ms}})


@pytest.mark.parametrize(
    ("candidate", "message", "exit_code"),
    [
        (Candidate("digits", BENCH, stored(targets=(AWAY,)), StageError("of all")), "bench: no answer", 3),
        (Candidate("digits", BENCH, None, StageError("of all")), "of all", 4),
        (Candidate("digits", BENCH, stored()), "digits on bench: the run has no result for it.", 4),
    ],
)
def test_candidate_without_a_result_knows_what_went_wrong(candidate, message, exit_code):
    assert candidate.rows == []
    assert (str(candidate.loss), candidate.loss.exit_code) == (message, exit_code)


def test_candidate_has_the_rows_of_its_own_target():
    both = stored(row(), row(target="nano"))
    assert [one.target for one in Candidate("digits", BENCH, both).rows] == ["bench"]


def test_champion_without_a_result_in_its_run_is_told():
    champion = Champion(
        model="digits.orin-nx", version=3, run_id="c" * 32, variant="pruned-fp32", target="bench"
    )
    contest = Contest(BENCH, stored(row()), row(), champion, stored(row(), row(target="nano")))
    assert contest.held.target == "bench"
    with pytest.raises(TrackingError, match=r"version 3 .* has no result of pruned-fp32 on bench"):
        _ = replace(contest, holder=stored(row(target="nano"))).held


@pytest.mark.parametrize(
    ("error", "candidate", "name", "kind"),
    [
        ("", row(), "Completed", "COMPLETED"),
        ("", row(verdict=Verdict.UNKNOWN), "Unknown", "COMPLETED"),
        ("", row(verdict=Verdict.FAIL), "Failed", "FAILED"),
        ("bench: no answer", None, "Failed", "FAILED"),
    ],
)
def test_state_that_the_flow_ends_in(error, candidate, name, kind):
    night_row = NightRow(
        recipe="digits", target="bench", target_class="orin-nx", error=error, candidate=candidate
    )
    state = ended(NightResult(run_id="f" * 32, rows=(night_row,)))
    assert (state.name, state.type.value) == (name, kind)


def test_recipe_that_cannot_be_read_fails_alone(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: broken\nepochs: 3\n")
    orders, (refused,) = read_orders([str(broken), "digits"], ["loopback"], None)
    assert [(order.recipe.name, [target.name for target in order.targets]) for order in orders] == [
        ("digits", ["loopback"])
    ]
    assert (refused.status, refused.exit_code, refused.name) == ("FAILED", 2, str(broken))
    assert "epochs" in refused.error
    assert NightResult(run_id="f" * 32, rows=(refused,)).exit_code == 2


def test_recipes_of_one_name_are_refused(tmp_path):
    twin = tmp_path / "twin.yaml"
    twin.write_text("extends: digits\nname: digits\n")
    with pytest.raises(ConfigError, match=r"twin.*' are both the recipe 'digits'"):
        read_orders(["digits", str(twin)], None, None)


def test_targets_that_are_not_there_fail_a_recipe():
    orders, refused = read_orders(["digits"], ["no-such-target"], None)
    assert orders == []
    assert "no-such-target" in refused[0].error


def test_promotion_by_hand_takes_the_winner_or_what_is_named():
    rows = [
        row("baseline-fp32"),
        row(latency_ms=0.5),
        row("pruned-int8-qat", latency_ms=0.4, verdict=Verdict.FAIL),
    ]
    assert [one.variant for one in rows_to_promote(rows, None, [])] == ["pruned-fp32"]
    assert [one.variant for one in rows_to_promote(rows, "pruned-int8-qat", ["bench"])] == ["pruned-int8-qat"]
    with pytest.raises(ConfigError, match="nothing on 'nano'"):
        rows_to_promote(rows, None, ["nano"])
    with pytest.raises(ConfigError, match="no variant 'best' on bench"):
        rows_to_promote(rows, "best", [])
    with pytest.raises(ConfigError, match="Every variant missed a gate on bench"):
        rows_to_promote(rows[2:], None, [])


FAILED_GATE, PASSED_GATE = row(verdict=Verdict.FAIL), row()


@pytest.mark.parametrize(
    ("changes", "candidate", "name"),
    [
        ([Change.SAME], FAILED_GATE, "missed"),
        ([Change.UNKNOWN], FAILED_GATE, "missed"),
        ([Change.SAME, Change.REGRESSED], FAILED_GATE, "regressed"),
        ([Change.REGRESSED], PASSED_GATE, "regressed"),
        ([Change.SAME], PASSED_GATE, "same"),
        ([], FAILED_GATE, "missed"),
        ([], PASSED_GATE, "new"),
        ([], None, "failed"),
    ],
)
def test_event_says_that_a_gate_was_missed(changes, candidate, name):
    metrics = tuple(ComparedMetric(metric="top1", before=1.0, after=1.0, change=one) for one in changes)
    compared = make_compared().model_copy(update={"metrics": metrics}) if changes else None
    night_row = NightRow(
        recipe="digits", target="bench", target_class="orin-nx", candidate=candidate, compared=compared,
        error_exit_code=1,
    )  # fmt: skip
    assert event_name(night_row) == f"jetway.verdict.{name}"


@pytest.mark.parametrize(
    ("recipe", "key"), [("digits", "nightly-digits-bench"), ("Bev_fusion.v2", "nightly-bev-fusion-v2-bench")]
)
def test_artifact_key_has_what_prefect_takes(recipe, key):
    assert artifact_key(NightRow(recipe=recipe, target="bench", target_class="bench")) == key
