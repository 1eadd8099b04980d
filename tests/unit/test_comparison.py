import numpy as np
import pytest

from jetway.tasks.comparison import (
    RowPair,
    compare_rows,
    differing_params,
    exit_code,
    match_rows,
    overall_change,
)
from jetway.tasks.errors import ConfigError
from jetway.tasks.metrics import Metric
from jetway.tasks.paired_scores import Scores
from jetway.tasks.results import Validity, VariantResult
from jetway.tasks.verdict import Change

TOP1 = Metric(name="top1")
ERRORS = Metric(name="errors", higher_is_better=False)
REGRESSED, SAME, IMPROVED, UNKNOWN = Change.REGRESSED, Change.SAME, Change.IMPROVED, Change.UNKNOWN


def row(variant="pruned-fp32", target="orin", **changes):
    values = {"variant": variant, "target": target, "precision": "fp32", "engine": "ort", "board": "a board"}
    return VariantResult.model_validate({**values, **changes})


def scores(values, name="top1", engine="a", inputs=("data",)):
    return Scores([{name: float(value)} for value in values], engine, inputs)


def pair(before, after, *, name="top1", first=None, second=None):
    """A pair of rows whose task metric is the mean of these records."""
    rows = [
        row(metrics={name: float(np.mean(values)), **(extra or {})})
        for values, extra in ((before, first), (after, second))
    ]
    return RowPair(*rows, (scores(before, name, "a"), scores(after, name, "b")))


def compare(*pairs, metric=TOP1, names=(), summarize=None, margin=0.01):
    return compare_rows(pairs, [metric], summarize or never, names=names, margin=margin)


def never(records):
    raise ConfigError("the workload is not here")


def one(*pairs, **options):
    (found,) = compare(*pairs, **options)[0].metrics
    return found


def answers(right, wrong):
    return [1] * right + [0] * wrong


def test_rows_are_matched_by_variant_and_target():
    common, alone = match_rows([row("a"), row("b"), row("a", "nano")], [row("c"), row("a"), row("b")])
    assert [(before.variant, after.variant) for before, after in common] == [("a", "a"), ("b", "b")]
    assert alone == ["only the first run has a on nano", "only the second run has c on orin"]


def test_runs_without_a_common_row_are_refused():
    with pytest.raises(
        ConfigError, match="share no variant on a target: the first has a on orin, the second b on"
    ):
        match_rows([row("a")], [row("b")])


def test_times_of_two_sessions_get_no_verdict_however_far_apart():
    found = one(
        pair([1], [1], first={"latency_ms_p50": 1.0}, second={"latency_ms_p50": 3.0}),
        names=["latency_ms_p50"],
    )
    assert (found.before, found.after) == (1.0, 3.0)
    assert (found.change, found.reason, found.evidence) == (UNKNOWN, "not measured in turns", None)


def test_invalid_sessions_and_other_boards_are_named():
    before = row(metrics={"latency_ms_p50": 1.0}, validity=Validity(valid=False, reasons=("hot",)))
    both = (scores([1]), scores([1]))
    invalid = RowPair(before, row(metrics={"latency_ms_p50": 1.0}), both)
    assert one(invalid, names=["latency_ms_p50"]).reason == "INVALID in the first run"
    boards = RowPair(
        row(metrics={"latency_ms_p50": 1.0}), row(metrics={"latency_ms_p50": 1.0}, board="another"), both
    )
    assert one(boards, names=["latency_ms_p50"]).reason == "on different boards"


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [(1e6, 1e6, SAME), (1e6, 1.005e6, SAME), (1e6, 1.02e6, REGRESSED), (1e6, 0.5e6, IMPROVED), (0, 0, SAME)],
)
def test_files_and_networks_are_compared_exactly(before, after, change):
    found = one(
        pair([1], [1], first={"size_bytes": before}, second={"size_bytes": after}), names=["size_bytes"]
    )
    assert found.change is change


def test_score_is_compared_sample_by_sample():
    right = answers(4900, 100)
    worse = one(pair(right, answers(4750, 250)))
    assert (worse.change, worse.evidence.count) == (REGRESSED, 5000)
    assert worse.evidence.effect == pytest.approx(0.03)
    assert one(pair(answers(4750, 250), right)).change is IMPROVED
    assert one(pair(right, answers(4899, 101))).change is SAME


def test_few_samples_leave_a_drop_open():
    found = one(pair(answers(98, 2), answers(97, 3)))
    assert found.change is UNKNOWN
    assert "100 samples leave" in found.reason


def test_score_that_is_better_when_lower_turns_round():
    found = one(pair(answers(250, 4750), answers(100, 4900), name="errors"), metric=ERRORS)
    assert (found.change, found.evidence.effect) == (IMPROVED, pytest.approx(-0.03))


def test_other_evaluation_data_cannot_be_paired():
    counts = RowPair(row(metrics={"top1": 1.0}), row(metrics={"top1": 1.0}), (scores([1, 1]), scores([1])))
    assert one(counts).reason == "other evaluation data: 2 samples and 1"
    digests = RowPair(
        row(metrics={"top1": 1.0}),
        row(metrics={"top1": 0.0}),
        (scores([1] * 9, inputs=("x",)), scores([0] * 9, inputs=("y",))),
    )
    assert (one(digests).change, one(digests).reason) == (UNKNOWN, "other evaluation data: the inputs differ")


def test_runs_that_kept_no_digest_of_their_inputs_are_paired_by_count():
    both = (scores(answers(4900, 100), engine="x", inputs=()), scores(answers(4900, 100), engine="y"))
    assert one(RowPair(row(metrics={"top1": 0.98}), row(metrics={"top1": 0.98}), both)).change is SAME


def test_one_engine_file_with_equal_records_is_the_same_however_few_they_are():
    both = (scores([1, 0], engine="x"), scores([1, 0], engine="x"))
    found = one(RowPair(row(metrics={"top1": 0.5}), row(metrics={"top1": 0.5}), both))
    assert (found.change, found.reason) == (SAME, "the same engine file")


def test_means_of_graded_records_need_no_workload():
    rng = np.random.default_rng(0)
    before = rng.uniform(0.5, 1.0, 2000)
    found = one(pair(before, before - rng.uniform(0.02, 0.06, 2000)))
    assert found.change is REGRESSED
    assert found.evidence.effect == pytest.approx(0.04, abs=0.002)


def graded_pair():
    """A metric that is not the mean of its records: the share of all that is above a half, squared."""
    before, after = np.linspace(0, 1, 400), np.linspace(-0.2, 0.8, 400)
    rows = [row(metrics={"top1": float(np.mean(values > 0.5) ** 2)}) for values in (before, after)]
    return RowPair(*rows, (scores(before, "raw", "a"), scores(after, "raw", "b")))


def squared(records):
    return {"top1": float(np.mean([record["raw"] > 0.5 for record in records]) ** 2)}


def test_other_scores_are_resampled_by_the_workloads_own_code():
    assert one(graded_pair(), summarize=squared).change is REGRESSED


def test_other_scores_without_the_workload_say_so():
    found = one(graded_pair())
    assert (found.change, found.reason) == (UNKNOWN, "the workload is not here")
    changed = one(graded_pair(), summarize=lambda records: {"top1": 0.1})
    assert changed.reason == "the workload's summarize() gives other values than were recorded"


def test_false_alarms_are_held_over_all_scores_together():
    doubtful = pair(answers(1000, 0) + answers(10, 1), answers(990, 10) + answers(10, 1))
    assert one(doubtful).change is REGRESSED
    rows = compare(*[doubtful] * 20)
    assert {found.metrics[0].change for found in rows} == {UNKNOWN}


def test_metrics_that_no_row_has_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"No metric 'top2' in these runs\. Did you mean 'top1'"):
        compare(pair([1], [1]), names=["top2"])


def test_worst_row_decides_the_exit_code():
    same, worse = pair(answers(4900, 100), answers(4900, 100)), pair(answers(4900, 100), answers(4700, 300))
    assert exit_code(overall_change(compare(same, same))) == 0
    assert exit_code(overall_change(compare(same, worse))) == 1
    assert exit_code(overall_change(compare(same, pair([1], [0])))) == 5


def test_only_params_that_differ_are_told():
    assert differing_params({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}) == {
        "b": ("2", "4"), "c": ("3", None), "d": (None, "5"),
    }  # fmt: skip
