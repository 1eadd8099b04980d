"""What a fallback gained, and how the ladder reads."""

from types import SimpleNamespace

import pytest
import yaml
from doubles.finished_run import make_run, store_run
from doubles.mute_tracker import MuteTracker

from jetway.configs.load import fallback_recipes, load_recipe
from jetway.configs.schema import Gate, PlanBConfig, Recipe, Target
from jetway.flows.plan_b import record_ladder, why_not, with_ladder
from jetway.flows.record import RESULT_PATH, RunResult
from jetway.tasks.errors import ConfigError
from jetway.tasks.gates import evaluate_gates
from jetway.tasks.ladder import Gain, Rung, RungStatus, gain_of, ladder_markdown
from jetway.tasks.metrics import Metric
from jetway.tasks.report.headline import run_headline
from jetway.tasks.results import TargetOutcome, TargetStatus, Validity, VariantResult
from jetway.tasks.store import Store
from jetway.tasks.tracking.tracker import Tracker

GATE = Gate.model_validate("pruned-fp32: latency_ms_p50 <= 5")


def rows(latency_ms, *, precision="fp32", params=1e6, macs=1e8, valid=True):
    """A baseline and a pruned variant, judged."""
    figures = {"latency_ms_p50": latency_ms, "params": params, "macs": macs, "size_bytes": 4 * params}
    common = {"target": "lab", "engine": "onnxruntime", "board": "a board"}
    baseline = VariantResult(variant="baseline-fp32", precision="fp32", metrics=figures, **common)
    pruned = VariantResult(
        variant="pruned-fp32",
        precision=precision,
        metrics=figures,
        validity=Validity(valid=valid, reasons=() if valid else ("hot",)),
        **common,
    )
    return evaluate_gates([baseline, pruned], [GATE])


def test_gain_is_of_the_variant_that_missed_in_canaries():
    gain = gain_of("lab", rows(10.0), rows(6.0, params=5e5, macs=4e7), (2.0, 3.0))
    assert (gain.variant, gain.instead_of, gain.passed) == ("pruned-fp32", "pruned-fp32", False)
    assert gain.predicted_latency_ratio == pytest.approx(0.4)
    assert gain.predicted_size_ratio == pytest.approx(0.5)
    # 10 ms were 5 canaries, and 6 ms are 2
    assert gain.measured_latency_ratio == pytest.approx(0.4)
    assert gain.missed == ("pruned-fp32: FAIL latency_ms_p50 6, limit 5",)
    assert gain.metrics()["lab.measured_size_ratio"] == pytest.approx(0.5)


def test_macs_say_nothing_of_another_precision():
    gain = gain_of("lab", rows(10.0), rows(2.0, precision="int8-qat"), (1.0, 1.0))
    assert gain.predicted_latency_ratio is None
    assert gain.predicted_size_ratio == pytest.approx(0.25)
    assert gain.passed


def test_an_invalid_session_gains_nothing_and_passes_nothing():
    gain = gain_of("lab", rows(10.0), rows(2.0, valid=False), (1.0, 1.0))
    assert gain.measured_latency_ratio is None
    assert not gain.passed
    assert gain.missed == ("pruned-fp32: UNKNOWN latency_ms_p50 2, limit 5",)


@pytest.mark.parametrize(
    ("budget", "tried", "minutes", "reason"),
    [
        ({}, 1, 1e6, ""),
        ({"max_tries": 1}, 1, 0.0, "max_tries is 1"),
        ({"max_tries": 2}, 1, 0.0, ""),
        ({"max_minutes": 10}, 1, 12.34, "max_minutes is 10, and 12.3 have gone"),
        ({"max_minutes": 10}, 1, 9.0, ""),
    ],
)
def test_the_budget_ends_the_ladder(budget, tried, minutes, reason):
    fallbacks = [{"name": name, "overrides": {"seed": 1}} for name in ("a", "b")]
    plan_b = PlanBConfig.model_validate({"fallbacks": fallbacks, **budget})
    assert why_not(plan_b, [Target(name="lab")], tried, minutes) == reason
    assert why_not(plan_b, [], tried, minutes) == "one before it passed"


def rung(name, *passed, missed=()):
    gains = [Gain(target=t, variant="v", instead_of="v", passed=t in passed) for t in (*passed, *missed)]
    return Rung(
        name=name, overrides={"seed": "1"}, status=RungStatus.MISSED, run_id=f"run of {name}", gains=gains
    )


def test_a_target_passes_with_the_fallback_that_passed_there():
    states = {"a": 1, "b": 1, "c": 0, "d": 5}
    outcomes = [
        TargetOutcome(name=name, status=TargetStatus.FINISHED, exit_code=code)
        for name, code in states.items()
    ]
    result = RunResult(
        run_id="r", exit_code=1, rows=(), targets=outcomes, task_metrics=(Metric(name="top1"),)
    )
    half = with_ladder(result, [rung("x", "a", missed=["b"])])
    assert [(one.exit_code, one.plan_b) for one in half.targets] == [(0, "x"), (1, ""), (0, ""), (5, "")]
    assert half.exit_code == 1
    whole = with_ladder(result, [rung("x", "a", missed=["b"]), rung("y", "b")])
    assert [one.plan_b for one in whole.targets] == ["x", "y", "", ""]
    assert whole.exit_code == 5


def test_the_ladder_reads_in_order():
    text = ladder_markdown([rung("x", missed=["lab"]), rung("y", "lab")])
    assert text.index("| x | seed=1 | lab | MISSED |") < text.index("| y | seed=1 | lab | PASSED |")
    assert ladder_markdown([]) == ""
    failed = rows(10.0)
    assert run_headline(failed, ladder=[rung("y", "lab")]).sentence.endswith("Plan B: y passed on lab")
    assert run_headline(failed, ladder=[rung("y", "lab")]).tone == "good"
    assert run_headline(failed, ladder=[rung("y", missed=["lab"])]).tone == "bad"
    assert run_headline(failed, ladder=[rung("y", "lab")], failed_targets=1).tone == "bad"


MINIMAL = {
    "name": "mine",
    "workload": {"class_path": "my_package.my_module:Mine", "options": {"size": 64}},
    "variants": ["baseline-fp32", "pruned-int8-ptq-entropy"],
    "prune": {"pruning_ratio": 0.5},
}


def test_a_fallback_is_the_recipe_with_some_keys_changed():
    overrides = {
        "prune.pruning_ratio": 0.7,
        "workload.options.size": 48,
        "variants": ["baseline-fp32", "pruned-fp16"],
    }
    recipe = Recipe.model_validate(MINIMAL | {"plan_b": [{"name": "less", "overrides": overrides}]})
    (other,) = fallback_recipes(recipe).values()
    assert (other.prune.pruning_ratio, other.workload.options) == (0.7, {"size": 48})
    assert [variant.name for variant in other.variants] == ["baseline-fp32", "pruned-fp16"]
    assert other.plan_b is None
    same = recipe.model_copy(
        update={"plan_b": None, **{key: getattr(other, key) for key in overrides_at(overrides)}}
    )
    assert other == same


def overrides_at(overrides):
    """The sections that they reach."""
    return {key.split(".")[0] for key in overrides}


@pytest.mark.parametrize(
    ("plan_b", "fragments"),
    [
        ([], ["plan_b.fallbacks"]),
        ([{"name": "a", "overrides": {"gates": []}}], ["cannot change gates", "same gates"]),
        ([{"name": "a", "overrides": {}}], ["overrides"]),
        ([{"name": "a", "overrides": {"seed": seed}} for seed in (1, 2)], ["a name of its own"]),
        ({"fallback": []}, ["Did you mean 'fallbacks'?"]),
        ([{"name": "less", "overrides": {"prune.pruning_ratoi": 0.7}}], ["plan_b less", "'pruning_ratio'"]),
        ([{"name": "less", "overrides": {"prune.pruning_ratio": 1.5}}], ["plan_b less", "less than 1"]),
        ([{"name": "less", "overrides": {"name.first": 1}}], ["cannot change name.first"]),
        ([{"name": "less", "overrides": {"seed.first": 1}}], ["plan_b less", "seed"]),
    ],
)
def test_a_bad_fallback_is_refused_with_the_recipe(plan_b, fragments, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"plan_b": plan_b}))
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("away", [False, True])
def test_ladder_is_recorded_also_where_mlflow_answers_nothing(away):
    """Without its answer the description stays as it was: what it says is not known."""
    tracker, fresh = MuteTracker(), Tracker()
    made = make_run(variants=("baseline-fp32",), gates=())
    run_id = store_run(made, load_recipe("digits")[0], tracker, Store())
    tracker.describe(run_id, "The table.")
    tracker.away = away
    rung = Rung(name="prune-more", overrides={}, status=RungStatus.FAILED, error="as asked")
    result = RunResult(run_id=run_id, exit_code=1, rows=tuple(made.rows), task_metrics=tuple(made.metrics))
    record_ladder(SimpleNamespace(tracker=tracker, run_id=run_id), with_ladder(result, [rung]))
    assert [one["name"] for one in fresh.load_json(run_id, RESULT_PATH)["ladder"]] == ["prune-more"]
    tags = fresh.run(run_id).tags
    assert tags["plan_b"] == "none passed"
    assert tags["mlflow.note.content"].startswith("The table.")
    assert fresh.has_file(run_id, "report.html") is not away
    assert ("prune-more" in tags["mlflow.note.content"]) is not away
