"""Parts of the nightly flow that need neither a target nor a server."""

from types import SimpleNamespace

import pytest
from doubles.finished_night import make_candidate

from jetway.configs.schema import Target
from jetway.flows.nightly import Candidate, ended
from jetway.flows.promote import rows_to_promote
from jetway.flows.publish import artifact_key
from jetway.flows.record import RunResult
from jetway.tasks.errors import ConfigError, StageError
from jetway.tasks.nightly import NightResult, NightRow
from jetway.tasks.results import GateVerdict, TargetOutcome, TargetStatus, Verdict

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


@pytest.mark.parametrize(
    ("recipe", "key"), [("digits", "nightly-digits-bench"), ("Bev_fusion.v2", "nightly-bev-fusion-v2-bench")]
)
def test_artifact_key_has_what_prefect_takes(recipe, key):
    assert artifact_key(NightRow(recipe=recipe, target="bench", target_class="bench")) == key
