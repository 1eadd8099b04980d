"""The nightly flow: every recipe deployed anew, and held against its champion on every target.

deploy ── look up the champion ── duel on the target ── judge the whole night ── promote ── publish
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from prefect import flow, tags
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.utilities.annotations import allow_failure

from jetway.configs.load import check_one_each, load_recipe, load_targets
from jetway.configs.schema import Recipe, Target
from jetway.flows.contest import Contest, Settled, in_turns, judge_settled, settle
from jetway.flows.deploy import deploy
from jetway.flows.pipeline import OBSERVER, Observer, SecondObserver, observing
from jetway.flows.promote import promote_row
from jetway.flows.publish import announce, log_night
from jetway.flows.stored_run import StoredRun
from jetway.flows.zombies import FLOW_RUN_TAG, TEAM_TAG
from jetway.tasks.comparison import ComparedRow
from jetway.tasks.duel import Budget, DuelResult
from jetway.tasks.errors import ConfigError, JetwayError, StageError, TrackingError
from jetway.tasks.gates import winner
from jetway.tasks.nightly import NightResult, NightRow, Policy, how_to_promote, to_promote, why_not_promoted
from jetway.tasks.results import TargetOutcome, VariantResult
from jetway.tasks.stage import Progress
from jetway.tasks.tracking.registry import model_name
from jetway.tasks.tracking.tracker import HANDOVER_S, Tracker
from jetway.tasks.tracking.values import Status
from jetway.tasks.verdict import Change

logger = logging.getLogger("jetway")

BUDGET_MINUTES = 10.0


def run_name() -> str:
    return f"nightly {', '.join(flow_run.parameters['recipes'])}"


@flow(name="nightly", flow_run_name=run_name, persist_result=False)
def nightly(
    recipes: list[str],
    targets: list[str] | None = None,
    overrides: list[str] | None = None,
    promote: Policy = Policy.ON_IMPROVEMENT,
    budget_minutes: float = BUDGET_MINUTES,
) -> State[NightResult]:
    """Says of each recipe on each target whether it got worse than its champion, and goes red where it did.

    Ends Failed when something REGRESSED, missed a gate or could not run, and Completed by the name of Unknown when
    something is not known. The state's data is a ``NightResult``.

    Args:
        recipes: Names of recipes, or the paths of their YAML files in the project.
        targets: Names of targets, or their YAML files, instead of those that the recipes name.
        overrides: Keys of the recipes to change, each as key=value, such as qat.epochs=3.
        promote: When a candidate becomes champion without being asked.
        budget_minutes: Longest time in which two engines are measured in turns.
    """
    observer = OBSERVER.get() or Observer()
    orders, refused = read_orders(recipes, targets, overrides)
    with night_run(Tracker(), recipes, targets, promote) as night:
        observer.on_start(night.run_id)
        candidates = [one for order in orders for one in deploy_recipe(night, observer, order)]
        judged = judge_night(night, candidates, Budget(minutes=budget_minutes), observer.progress)
        rows = promote_night(night, [*refused, *judged], promote)
        result = NightResult(run_id=night.run_id, rows=tuple(rows))
        log_night(night.tracker, result, night.duels, night.started)
    for row in rows:
        announce(row, result.run_id)
    return ended(result)


def ended(result: NightResult) -> State[NightResult]:
    """The state that the flow ends in."""
    if result.is_red:
        return Failed(message=result.message, data=result)
    if result.exit_code:
        return Completed(name="Unknown", message=result.message, data=result)
    return Completed(message=result.message, data=result)


@dataclass(frozen=True)
class Order:
    """A recipe to deploy, as it was asked for."""

    name: str
    recipe: Recipe
    path: Path
    targets: Sequence[Target]
    choices: list[str] | None
    overrides: list[str] | None


def read_orders(
    names: Sequence[str], choices: list[str] | None, overrides: list[str] | None
) -> tuple[list[Order], list[NightRow]]:
    """The recipes that can be deployed, and for each other one a row that says what is wrong with it.

    Raises ConfigError for two of one name.
    """
    orders: list[Order] = []
    refused: list[NightRow] = []
    for name in names:
        try:
            orders.append(read_order(name, choices, overrides))
        except ConfigError as exc:
            refused.append(
                NightRow(
                    recipe=name, target="", target_class="", error=str(exc), error_exit_code=exc.exit_code
                )
            )
    check_one_each([(order.name, order.recipe) for order in orders])
    return orders, refused


def read_order(name: str, choices: list[str] | None, overrides: list[str] | None) -> Order:
    recipe, path = load_recipe(name, overrides or [])
    targets = load_targets(choices or recipe.targets, near=path)
    return Order(name, recipe, path, targets, choices, overrides)


@dataclass(frozen=True)
class Candidate:
    """What a recipe made of tonight's code for a target; without a run it made nothing."""

    recipe: str
    target: Target
    run: StoredRun | None = None
    error: JetwayError | None = None

    @property
    def name(self) -> str:
        return f"{self.recipe} on {self.target.name}"

    @property
    def rows(self) -> list[VariantResult]:
        rows = self.run.result.rows if self.run else ()
        return [row for row in rows if row.target == self.target.name]

    @property
    def outcome(self) -> TargetOutcome | None:
        """How the target ended, where the run got as far as to say."""
        outcomes = self.run.result.targets if self.run else ()
        return next((one for one in outcomes if one.name == self.target.name), None)

    @property
    def loss(self) -> JetwayError:
        """Why there are no rows: what went wrong on the target, or with the recipe as a whole."""
        if self.outcome and self.outcome.error:
            return JetwayError(self.outcome.error, exit_code=self.outcome.exit_code)
        return self.error or StageError(f"{self.name}: the run has no result for it.")


@dataclass
class Night:
    """The night's own run in MLflow, and what was found while it went on."""

    tracker: Tracker
    run_id: str
    duels: dict[str, DuelResult] = field(default_factory=dict)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))


@contextmanager
def night_run(
    tracker: Tracker, recipes: Sequence[str], targets: Sequence[str] | None, policy: Policy
) -> Iterator[Night]:
    """The night's MLflow run, ended as FINISHED, FAILED or KILLED."""
    tracker.reap()
    params = {"recipes": ", ".join(recipes), "targets": ", ".join(targets or ()), "promote": str(policy)}
    flow_tag = {FLOW_RUN_TAG: flow_run_id} if (flow_run_id := flow_run.get_id()) else {}
    name = f"nightly {datetime.now():%Y-%m-%d %H:%M:%S}"
    night = Night(tracker, tracker.start_night(name, params, flow_tag))
    status: Status = "KILLED"
    try:
        yield night
        status = "FINISHED"
    except Exception as exc:
        status = "FAILED"
        tracker.set_tags(night.run_id, {"error": f"{type(exc).__name__}: {exc}"})
        raise
    finally:
        tracker.finish(night.run_id, status)
        tracker.replay(wait_s=0.0 if status == "KILLED" else HANDOVER_S)


def deploy_recipe(night: Night, observer: Observer, order: Order) -> list[Candidate]:
    """A candidate a target. What goes wrong with a recipe or a target is its own, and hides no other."""
    own, error = SecondObserver(observer), None
    try:
        with observing(own), tags(TEAM_TAG):
            deploy(order.name, order.choices, order.overrides)
    except Exception as exc:
        error = as_own_error(exc, f"the deployment of {order.recipe.name}")
    run = stored_run(night, own.run_id, order.path)
    return [Candidate(order.recipe.name, target, run, error) for target in order.targets]


def stored_run(night: Night, run_id: str, path: Path) -> StoredRun | None:
    """The run of a deployment, if it got as far as to have a result."""
    try:
        return StoredRun(night.tracker, run_id, path) if run_id else None
    except TrackingError:
        return None


def judge_night(
    night: Night, candidates: Sequence[Candidate], budget: Budget, progress: Progress
) -> list[NightRow]:
    """A row for each candidate, verdicts corrected for all comparisons of the night together."""
    rows: dict[str, NightRow] = {}
    contests: dict[str, Contest] = {}
    for candidate in candidates:
        with failing(candidate, rows):
            rows[candidate.name] = new_row(candidate)
            if contest := find_contest(night.tracker, candidate):
                contests[candidate.name] = contest
    settled: dict[str, Settled] = {}
    futures = start_all(contests, budget, progress)
    for candidate in candidates:
        if candidate.name in futures:
            with failing(candidate, rows):
                settled[candidate.name] = futures[candidate.name].result()
    night.duels.update({name: one.duel for name, one in settled.items() if one.duel})
    for name, compared in judge_settled(contests, settled).items():
        rows[name] = compared_row(rows[name], contests[name], compared, settled[name].notes)
    return list(rows.values())


@contextmanager
def failing(candidate: Candidate, rows: dict[str, NightRow]) -> Iterator[None]:
    """What the block raises is told as the candidate's own failure."""
    try:
        yield
    except Exception as exc:
        error = as_own_error(exc, candidate.name)
        rows[candidate.name] = NightRow(
            recipe=candidate.recipe,
            target=candidate.target.name,
            target_class=candidate.target.target_class,
            run_id=candidate.run.run_id if candidate.run else "",
            error=str(error),
            error_exit_code=error.exit_code,
        )


def as_own_error(exc: Exception, what: str) -> JetwayError:
    """The error, or for a bug one that names it, after its traceback was logged."""
    if isinstance(exc, JetwayError):
        return exc
    logger.exception("%s failed unexpectedly", what, exc_info=exc)
    return StageError(f"{type(exc).__name__}: {exc}")


def new_row(candidate: Candidate) -> NightRow:
    """The fastest of tonight's variants that missed no gate. Raises what left the candidate without a result."""
    if candidate.run is None or not candidate.rows:
        raise candidate.loss
    plan_b = candidate.outcome.plan_b if candidate.outcome else ""
    fallback = f"plan B {plan_b} passed the gates; it is not what is compared here"
    return NightRow(
        recipe=candidate.recipe,
        target=candidate.target.name,
        target_class=candidate.target.target_class,
        run_id=candidate.run.run_id,
        candidate=winner(candidate.rows) or candidate.rows[0],
        task_metrics=candidate.run.result.task_metrics,
        notes=(fallback,) if plan_b else (),
    )


def find_contest(tracker: Tracker, candidate: Candidate) -> Contest | None:
    """The champion's variant of tonight against the champion; tonight's winner where the recipe dropped it."""
    assert candidate.run is not None
    champion = tracker.champion(model_name(candidate.recipe, candidate.target.target_class))
    if champion is None:
        return None
    holder = StoredRun(tracker, champion.run_id, candidate.run.path)
    rows = {row.variant: row for row in candidate.rows}
    if champion.variant in rows:
        return Contest(candidate.target, candidate.run, rows[champion.variant], champion, holder)
    best = winner(candidate.rows) or candidate.rows[0]
    note = f"the recipe no longer has {champion.variant}; {best.variant} stands in for it"
    return Contest(candidate.target, candidate.run, best, champion, holder, (note,))


def start_all(
    contests: Mapping[str, Contest], budget: Budget, progress: Progress
) -> dict[str, PrefectFuture[Settled]]:
    """Targets side by side, the contests of a target one after the other."""
    last: dict[str, PrefectFuture[Settled]] = {}
    futures: dict[str, PrefectFuture[Settled]] = {}
    for name, contest in contests.items():
        target = contest.target.name
        work = partial(settle, contest, budget, len(contests), progress)
        before = [allow_failure(last[target])] if target in last else []
        futures[name] = last[target] = in_turns.submit(name, work, return_state=False, wait_for=before)
    return futures


def compared_row(row: NightRow, contest: Contest, compared: ComparedRow, notes: Sequence[str]) -> NightRow:
    changes = {
        "candidate": contest.row,
        "champion": contest.champion,
        "compared": compared,
        "notes": (*row.notes, *contest.notes, *notes),
    }
    return row.model_copy(update=changes)


def promote_night(night: Night, rows: Sequence[NightRow], policy: Policy) -> list[NightRow]:
    """The rows, their candidates made champions where the policy says so, and why others were not."""
    moved = {row.name: promoted(night, row) for row in to_promote(rows, policy)}
    told = [moved.get(row.name, row) for row in rows]
    return [
        row if row.name in moved else with_advice(row, why_not_promoted(row, told, policy)) for row in told
    ]


def promoted(night: Night, row: NightRow) -> NightRow:
    """The row, its candidate made champion. Where that fails a note says so, and the verdict stands."""
    assert row.candidate is not None
    why = "better than the champion before it" if row.champion else "the first champion"
    try:
        champion = promote_row(StoredRun(night.tracker, row.run_id), row.candidate, why)
    except Exception as exc:
        error = as_own_error(exc, f"the promotion of {row.name}")
        return with_advice(row, f"not promoted: {error}")
    return row.model_copy(update={"promoted": champion})


def with_advice(row: NightRow, why_not: str) -> NightRow:
    """Why the candidate is no champion, and how it becomes one by hand, where that may be wanted."""
    notes = [why_not] if why_not else []
    if row.candidate is not None and row.status in ("NEW", Change.IMPROVED):
        notes.append(f"to make it champion: {how_to_promote(row)}")
    return row.model_copy(update={"notes": (*row.notes, *notes)})
