"""Plan B: where a gate failed, the recipe's fallbacks are tried on the same targets, until one passes.

UNKNOWN and INVALID are no misses: another network does not make the evidence better.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from jetway.configs.load import fallback_recipes
from jetway.configs.schema import Fallback, PlanBConfig, Recipe, Target
from jetway.flows.pipeline import Pipeline, SecondObserver, recording
from jetway.flows.record import RESULT_PATH, Attempt, RunResult, run_exit_code
from jetway.flows.report import log_report
from jetway.tasks.errors import JetwayError, TrackingError
from jetway.tasks.gates import EXIT_GATE_MISSED, EXIT_PASSED
from jetway.tasks.ladder import Gain, Rung, RungStatus, gain_of, ladder_markdown, overrides_of
from jetway.tasks.results import TargetOutcome
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import NOTE_TAG, PLAN_B_TAG

logger = logging.getLogger("jetway")

Try = Callable[[Pipeline], Attempt]


def climb(run: Pipeline, first: Attempt, attempt: Try) -> RunResult:
    """The run's result, with what its fallbacks gave on the targets that missed a gate; each is a run below it."""
    missed = {one.name for one in first.result.targets if one.exit_code == EXIT_GATE_MISSED}
    targets = [target for target in run.targets if target.name in missed]
    if run.recipe.plan_b is None or not targets:
        return first.result
    ladder = tuple(climbed(run, run.recipe.plan_b, first, targets, attempt))
    result = with_ladder(first.result, ladder)
    record_ladder(run, result)
    return result


def climbed(
    run: Pipeline, plan_b: PlanBConfig, first: Attempt, targets: Sequence[Target], attempt: Try
) -> Iterator[Rung]:
    """A rung for each fallback, tried on the targets that none before it has passed on."""
    recipes, began = fallback_recipes(run.recipe), time.monotonic()
    left = list(targets)
    for number, fallback in enumerate(plan_b.fallbacks):
        reason = why_not(plan_b, left, number, (time.monotonic() - began) / 60)
        if reason:
            yield Rung(
                name=fallback.name,
                overrides=overrides_of(fallback),
                status=RungStatus.NOT_TRIED,
                error=reason,
            )
            continue
        rung = try_fallback(run, fallback, recipes[fallback.name], first, left, attempt)
        left = [target for target in left if target.name not in rung.passed]
        yield rung


def why_not(plan_b: PlanBConfig, left: Sequence[Target], tried: int, minutes: float) -> str:
    """Why the next fallback is not tried; empty when it is."""
    if not left:
        return "one before it passed"
    if plan_b.max_tries is not None and tried >= plan_b.max_tries:
        return f"max_tries is {plan_b.max_tries}"
    if plan_b.max_minutes is not None and minutes > plan_b.max_minutes:
        return f"max_minutes is {plan_b.max_minutes:g}, and {minutes:.1f} have gone"
    return ""


def try_fallback(
    run: Pipeline, fallback: Fallback, recipe: Recipe, first: Attempt, targets: Sequence[Target], attempt: Try
) -> Rung:
    """One fallback as a run below the pipeline's. What fails there is the rung's error, and the ladder goes on."""
    names = ", ".join(target.name for target in targets)
    logger.warning("a gate failed on %s: trying plan B %s", names, fallback.name)
    began = time.monotonic()
    pipeline = Pipeline(
        recipe,
        run.path,
        targets,
        run.tracker,
        SecondObserver(run.observer),
        parent=run.run_id,
        fallback=fallback.name,
    )
    gains: tuple[Gain, ...] = ()
    error = ""
    try:
        with recording(pipeline):
            tried = attempt(pipeline)
            gains = gains_of(pipeline, first, tried)
            error = str(tried.error or "")
    except TrackingError:
        raise
    except JetwayError as exc:
        error = str(exc)
        logger.warning("plan B %s failed: %s", fallback.name, exc)
    return Rung(
        name=fallback.name,
        overrides=overrides_of(fallback),
        status=status_of(gains, targets),
        run_id=pipeline.run_id,
        minutes=(time.monotonic() - began) / 60,
        gains=gains,
        error=error,
    )


def gains_of(pipeline: Pipeline, first: Attempt, tried: Attempt) -> tuple[Gain, ...]:
    """What the fallback gained on each target that gave a result, also as metrics of its run."""
    gains = tuple(
        gain_of(
            one.target.name,
            first.rows_of(one.target.name),
            tried.rows_of(one.target.name),
            (first.canary_ms(one.target.name), tried.canary_ms(one.target.name)),
        )
        for one in tried.measured
    )
    for gain in gains:
        pipeline.tracker.log_metrics(pipeline.run_id, gain.metrics())
    return gains


def status_of(gains: Sequence[Gain], targets: Sequence[Target]) -> RungStatus:
    if not gains:
        return RungStatus.FAILED
    passed = sum(gain.passed for gain in gains) == len(targets)
    return RungStatus.PASSED if passed else RungStatus.MISSED


def with_ladder(result: RunResult, ladder: Sequence[Rung]) -> RunResult:
    """The result, in which a target that some fallback passed on has passed."""
    passed = {target: rung.name for rung in ladder for target in rung.passed}
    outcomes = tuple(_with_fallback(one, passed.get(one.name, "")) for one in result.targets)
    changes = {"ladder": tuple(ladder), "targets": outcomes, "exit_code": run_exit_code(outcomes)}
    return result.model_copy(update=changes)


def record_ladder(run: Pipeline, result: RunResult) -> None:
    """The ladder in the run's result, tags, description and report."""
    run.tracker.log_json(run.run_id, RESULT_PATH, result.model_dump(mode="json"))
    runs = {target: rung.run_id for rung in result.ladder for target in rung.passed}
    told = ", ".join(f"{one.plan_b} on {one.name}" for one in result.targets if one.plan_b)
    tags = {f"{PLAN_B_TAG}.{target}": run_id for target, run_id in runs.items()}
    tags[PLAN_B_TAG] = told or "none passed"
    if result.exit_code == EXIT_PASSED:
        tags["gate"] = "PASS"
    run.tracker.set_tags(run.run_id, tags)
    describe_ladder(run.tracker, run.run_id, result.ladder)
    log_report(run.tracker, run.run_id)


def describe_ladder(tracker: Tracker, run_id: str, ladder: Sequence[Rung]) -> None:
    """Below what the run's description says. Without it where MLflow is away: the result has the ladder too."""
    if not tracker.replay(wait_s=0.0):
        return
    try:
        note = tracker.run(run_id).tags.get(NOTE_TAG, "")
    except TrackingError as exc:
        logger.warning("the description of run %s lacks its ladder: %s", run_id[:8], exc)
        return
    tracker.describe(run_id, f"{note}\n\n{ladder_markdown(ladder)}")


def _with_fallback(outcome: TargetOutcome, name: str) -> TargetOutcome:
    return outcome.model_copy(update={"exit_code": EXIT_PASSED, "plan_b": name}) if name else outcome
