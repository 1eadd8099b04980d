"""The nightly flow: every recipe deployed anew, and held against its champion on every target.

deploy ── look up the champion ── duel on the target ── judge the whole night ── promote ── publish
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.utilities.annotations import allow_failure

from jetway.configs.load import load_recipe, load_targets
from jetway.configs.schema import Recipe, Target, Variant
from jetway.flows.deploy import deploy
from jetway.flows.in_turns import duel_engines, show_run
from jetway.flows.pipeline import OBSERVER, Observer, SecondObserver, observing
from jetway.flows.promote import promote_row
from jetway.flows.publish import log_night, publish_row
from jetway.flows.stored_run import StoredRun
from jetway.tasks.artifacts import Engine
from jetway.tasks.build import build_engine
from jetway.tasks.comparison import ComparedRow, RowPair, gather_rows, judge_rows, with_duel, with_same_engine
from jetway.tasks.duel import Budget, DuelResult, Side
from jetway.tasks.errors import JetwayError, StageError, TrackingError
from jetway.tasks.gates import winner
from jetway.tasks.nightly import NightResult, NightRow, Policy, how_to_promote, may_be_promoted
from jetway.tasks.passport_changes import passport_changes
from jetway.tasks.results import TargetOutcome, VariantResult
from jetway.tasks.stage import Progress
from jetway.tasks.target.session import TargetSession, open_target
from jetway.tasks.tracking.registry import Champion, model_name
from jetway.tasks.tracking.tracker import HANDOVER_S, Tracker
from jetway.tasks.tracking.values import Status
from jetway.tasks.verdict import ACCURACY_MARGIN, Change

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
    wanted = [(name, *load_recipe(name, overrides or [])) for name in recipes]
    reached = {name: load_targets(targets or recipe.targets, near=path) for name, recipe, path in wanted}
    with night_run(Tracker(), recipes, targets, promote) as night:
        observer.on_start(night.run_id)
        candidates = [
            candidate
            for name, recipe, path in wanted
            for candidate in deploy_recipe(
                night, observer, Order(name, recipe, path, reached[name], targets, overrides)
            )
        ]
        rows = judge_night(night, candidates, Budget(minutes=budget_minutes), observer.progress)
        rows = [promoted(night, row, promote) for row in rows]
        result = NightResult(run_id=night.run_id, rows=tuple(rows))
        for row in rows:
            publish_row(night.tracker, night.run_id, row, night.duels.get(row.name))
        log_night(night.tracker, result)
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


@dataclass(frozen=True)
class Contest:
    """A candidate's row and the champion that it is held against."""

    candidate: Candidate
    run: StoredRun
    row: VariantResult
    champion: Champion | None = None
    holder: StoredRun | None = None
    notes: tuple[str, ...] = ()

    @property
    def held(self) -> VariantResult:
        """The champion's row as it was recorded."""
        assert self.holder is not None
        assert self.champion is not None
        mine = (self.champion.variant, self.champion.target)
        return next(row for row in self.holder.result.rows if (row.variant, row.target) == mine)


@dataclass(frozen=True)
class Settled:
    """What was measured in turns; no duel where both sides are the same engine file."""

    duel: DuelResult | None
    notes: tuple[str, ...] = ()


@dataclass
class Night:
    """The night's own run in MLflow, and what was found while it went on."""

    tracker: Tracker
    run_id: str
    runs: dict[str, StoredRun] = field(default_factory=dict)
    duels: dict[str, DuelResult] = field(default_factory=dict)


@contextmanager
def night_run(
    tracker: Tracker, recipes: Sequence[str], targets: Sequence[str] | None, policy: Policy
) -> Iterator[Night]:
    """The night's MLflow run, ended as FINISHED, FAILED or KILLED."""
    tracker.reap()
    params = {"recipes": ", ".join(recipes), "targets": ", ".join(targets or ()), "promote": str(policy)}
    night = Night(tracker, tracker.start_night(f"nightly {datetime.now():%Y-%m-%d %H:%M:%S}", params))
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
        with observing(own):
            deploy(order.name, order.choices, order.overrides)
    except Exception as exc:
        if not isinstance(exc, JetwayError):
            logger.exception("%s: the deployment failed unexpectedly", order.recipe.name)
        error = exc if isinstance(exc, JetwayError) else StageError(f"{type(exc).__name__}: {exc}")
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
    failed: dict[str, NightRow] = {}
    contests: dict[str, Contest] = {}
    for candidate in candidates:
        with failing(candidate, failed):
            contests[candidate.name] = find_contest(night, candidate)
    fights = {name: contest for name, contest in contests.items() if contest.champion}
    settled = settle_all(fights, budget, progress, failed)
    night.duels.update({name: one.duel for name, one in settled.items() if one.duel})
    compared = compare_all({name: fights[name] for name in settled}, settled)
    return [
        failed.get(one.name)
        or row_of(contests[one.name], compared.get(one.name), settled.get(one.name, Settled(None)).notes)
        for one in candidates
    ]


@contextmanager
def failing(candidate: Candidate, failed: dict[str, NightRow]) -> Iterator[None]:
    """What the block raises is told as the candidate's own failure."""
    try:
        yield
    except JetwayError as exc:
        failed[candidate.name] = NightRow(
            recipe=candidate.recipe,
            target=candidate.target.name,
            target_class=candidate.target.target_class,
            run_id=candidate.run.run_id if candidate.run else "",
            error=str(exc),
            error_exit_code=exc.exit_code,
        )


def find_contest(night: Night, candidate: Candidate) -> Contest:
    """The champion's variant of tonight against the champion; tonight's winner where there is none of either.

    Raises what left the candidate without a result.
    """
    if candidate.run is None or not candidate.rows:
        raise candidate.loss
    rows = {row.variant: row for row in candidate.rows}
    best = winner(candidate.rows) or candidate.rows[0]
    champion = night.tracker.champion(model_name(candidate.recipe, candidate.target.target_class))
    if champion is None:
        return Contest(candidate, candidate.run, best)
    holder = StoredRun(night.tracker, champion.run_id, candidate.run.path)
    if champion.variant in rows:
        return Contest(candidate, candidate.run, rows[champion.variant], champion, holder)
    note = f"the recipe no longer has {champion.variant}; {best.variant} stands in for it"
    return Contest(candidate, candidate.run, best, champion, holder, (note,))


def settle_all(
    contests: Mapping[str, Contest], budget: Budget, progress: Progress, failed: dict[str, NightRow]
) -> dict[str, Settled]:
    """Targets side by side, the contests of a target one after the other."""
    last: dict[str, PrefectFuture[Settled]] = {}
    futures: dict[str, PrefectFuture[Settled]] = {}
    for name, contest in contests.items():
        target = contest.row.target
        work = partial(settle, contest, budget, len(contests), progress)
        before = [allow_failure(last[target])] if target in last else []
        futures[name] = last[target] = in_turns.submit(name, work, return_state=False, wait_for=before)
    found: dict[str, Settled] = {}
    for name, future in futures.items():
        with failing(contests[name].candidate, failed):
            found[name] = future.result()
    return found


@task(name="in turns", task_run_name="in turns {name}", cache_policy=NO_CACHE, persist_result=False)
def in_turns(name: str, work: Callable[[], Settled]) -> Settled:
    return work()


def settle(contest: Contest, budget: Budget, comparisons: int, progress: Progress) -> Settled:
    """Measures both engines in turns on the candidate's target, unless they are one and the same file there."""
    candidate = contest.run.engine(contest.row)
    with open_target(contest.candidate.target) as session:
        champion, notes = champion_engine(contest, session)
        if is_same_file(champion, candidate):
            return Settled(None, notes)
        engines: dict[Side, Engine] = {"champion": champion, "candidate": candidate}
        result = duel_engines(
            contest.run.context,
            session,
            engines,
            contest.run.recipe.benchmark,
            budget=budget,
            comparisons=comparisons,
            on_run=partial(show_run, progress, contest.row),
        )
    return Settled(result, notes)


def champion_engine(contest: Contest, session: TargetSession) -> tuple[Engine, tuple[str, ...]]:
    """The champion's engine where its passport still fits the target; else built anew there, and a note of why."""
    assert contest.holder is not None
    recorded = contest.holder.engine(contest.held)
    recipe, held = contest.holder.recipe, contest.held
    backend = session.target.backend(Variant.model_validate(held.variant))
    engine = build_engine(
        contest.holder.context,
        session,
        contest.holder.model(held),
        recipe.build,
        recipe.tensorrt,
        backend=backend,
        variant=f"champion {held.variant}",
    )
    if engine == recorded:
        return engine, ()
    return engine, (
        f"the champion's engine was built anew from its ONNX file: {passport_changes(recorded, engine)}",
    )


def is_same_file(champion: Engine, candidate: Engine) -> bool:
    """Also the same place: engines that are loaded otherwise have other names."""
    return champion == candidate and champion.metadata["remote_path"] == candidate.metadata["remote_path"]


def compare_all(contests: Mapping[str, Contest], settled: Mapping[str, Settled]) -> dict[str, ComparedRow]:
    """Scores are judged together over the whole night; latencies were, by the share of each duel."""
    gathered = [gather(contest) for contest in contests.values()]
    return {
        name: with_latency_of(settled[name], contests[name], row)
        for name, row in zip(contests, judge_rows(gathered), strict=True)
    }


def gather(contest: Contest) -> ComparedRow:
    """Every metric of both sides, before anything is judged."""
    assert contest.holder is not None
    scores = contest.holder.scores(contest.held), contest.run.scores(contest.row)
    pair = RowPair(contest.held, contest.row, scores)
    metrics = contest.run.result.task_metrics
    return gather_rows([pair], metrics, contest.run.summarize, margin=ACCURACY_MARGIN)[0]


def with_latency_of(settled: Settled, contest: Contest, row: ComparedRow) -> ComparedRow:
    if settled.duel:
        return with_duel(row, settled.duel)
    return with_same_engine(row, contest.row.value("latency_ms_p50"))


def row_of(contest: Contest, compared: ComparedRow | None, notes: Sequence[str]) -> NightRow:
    candidate = contest.candidate
    plan_b = candidate.outcome.plan_b if candidate.outcome else ""
    fallback = [f"plan B {plan_b} passed the gates; it is not what is compared here"] if plan_b else []
    return NightRow(
        recipe=candidate.recipe,
        target=candidate.target.name,
        target_class=candidate.target.target_class,
        run_id=contest.run.run_id,
        candidate=contest.row,
        champion=contest.champion,
        task_metrics=contest.run.result.task_metrics,
        compared=compared,
        notes=(*contest.notes, *notes, *fallback),
    )


def promoted(night: Night, row: NightRow, policy: Policy) -> NightRow:
    """The row, its candidate made champion where the policy says so."""
    if not may_be_promoted(row, policy):
        return with_advice(row)
    assert row.candidate is not None
    why = "better than the champion before it" if row.champion else "the first champion"
    run = StoredRun(night.tracker, row.run_id)
    return row.model_copy(update={"promoted": promote_row(run, row.candidate, why)})


def with_advice(row: NightRow) -> NightRow:
    """How the candidate becomes champion by hand, where that may be wanted."""
    if row.candidate is None or row.status not in ("NEW", Change.IMPROVED):
        return row
    return row.model_copy(update={"notes": (*row.notes, f"to make it champion: {how_to_promote(row)}")})
