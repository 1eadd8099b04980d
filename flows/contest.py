"""A candidate held against its champion: both engines on the device, every other figure from the records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from prefect import task
from prefect.cache_policies import NO_CACHE

from jetway.configs.schema import Target, Variant
from jetway.flows.in_turns import duel_engines, show_run
from jetway.flows.stored_run import StoredRun
from jetway.tasks.artifacts import Engine
from jetway.tasks.build import build_engine
from jetway.tasks.comparison import ComparedRow, RowPair, gather_rows, judge_rows, with_duel, with_same_engine
from jetway.tasks.duel import Budget, DuelResult, Side
from jetway.tasks.errors import TrackingError
from jetway.tasks.passport_changes import passport_changes
from jetway.tasks.results import VariantResult
from jetway.tasks.stage import Progress
from jetway.tasks.target.session import TargetSession, open_target
from jetway.tasks.tracking.registry import Champion
from jetway.tasks.verdict import ACCURACY_MARGIN


@dataclass(frozen=True)
class Contest:
    """A row of tonight's run and the champion that it is held against."""

    target: Target
    run: StoredRun
    row: VariantResult
    champion: Champion
    holder: StoredRun
    notes: tuple[str, ...] = ()

    @property
    def held(self) -> VariantResult:
        """The champion's row as it was recorded. Raises TrackingError where its run has none."""
        mine = (self.champion.variant, self.champion.target)
        for row in self.holder.result.rows:
            if (row.variant, row.target) == mine:
                return row
        raise TrackingError(
            f"{self.champion.title} is the champion, but its run has no result of {mine[0]} on {mine[1]}. "
            "Promote another: jetway promote RUN."
        )


@dataclass(frozen=True)
class Settled:
    """All that both sides gave, its scores not judged yet; no duel where both are the same engine file."""

    figures: ComparedRow
    duel: DuelResult | None
    notes: tuple[str, ...] = ()


@task(name="in turns", task_run_name="in turns {name}", cache_policy=NO_CACHE, persist_result=False)
def in_turns(name: str, work: Callable[[], Settled]) -> Settled:
    return work()


def settle(contest: Contest, budget: Budget, comparisons: int, progress: Progress) -> Settled:
    """Measures both engines in turns on the candidate's target, unless they are one and the same file there.

    ``comparisons`` is how many duels share the false alarms. Raises what building and measuring raise.
    """
    figures = gather(contest)
    candidate = contest.run.engine(contest.row)
    with open_target(contest.target) as session:
        champion, notes = champion_engine(contest, session)
        if is_same_file(champion, candidate):
            return Settled(figures, None, notes)
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
    return Settled(figures, result, notes)


def gather(contest: Contest) -> ComparedRow:
    """Every metric of both sides, before anything is judged."""
    scores = contest.holder.scores(contest.held), contest.run.scores(contest.row)
    pair = RowPair(contest.held, contest.row, scores)
    metrics = contest.run.result.task_metrics
    return gather_rows([pair], metrics, contest.run.summarize, margin=ACCURACY_MARGIN)[0]


def champion_engine(contest: Contest, session: TargetSession) -> tuple[Engine, tuple[str, ...]]:
    """The champion's engine where its passport still fits the target; else built anew there, and a note of why."""
    recorded = contest.holder.engine(contest.held)
    recipe, variant = contest.holder.recipe, contest.held.variant
    engine = build_engine(
        contest.holder.context,
        session,
        contest.holder.model(contest.held),
        recipe.build,
        recipe.tensorrt,
        backend=session.target.backend(Variant.model_validate(variant)),
        variant=f"champion {variant}",
    )
    if engine == recorded:
        return engine, ()
    why = passport_changes(recorded, engine)
    return engine, (f"the champion's engine was built anew from its ONNX file: {why}",)


def is_same_file(champion: Engine, candidate: Engine) -> bool:
    """Also the same place: engines that are loaded otherwise have other names."""
    return champion == candidate and champion.metadata["remote_path"] == candidate.metadata["remote_path"]


def judge_settled(contests: Mapping[str, Contest], settled: Mapping[str, Settled]) -> dict[str, ComparedRow]:
    """Scores are judged together over the whole night; latencies were, by the share of each duel."""
    judged = judge_rows([one.figures for one in settled.values()])
    return {
        name: _with_latency(row, settled[name], contests[name])
        for name, row in zip(settled, judged, strict=True)
    }


def _with_latency(row: ComparedRow, settled: Settled, contest: Contest) -> ComparedRow:
    if settled.duel:
        return with_duel(row, settled.duel)
    return with_same_engine(row, contest.row.value("latency_ms_p50"))
