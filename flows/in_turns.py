"""``jetway compare --in-turns``: the engines of two stored runs, measured anew in turns on their targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial

from jetway.configs.load import load_target
from jetway.configs.schema import BenchmarkConfig
from jetway.flows.stored_run import StoredRun
from jetway.tasks.artifacts import Engine
from jetway.tasks.benchmark import benchmark_engines
from jetway.tasks.duel import Budget, DuelResult, DuelRun, Side, counted_pairs, duel
from jetway.tasks.measurement import BenchmarkResult
from jetway.tasks.results import VariantResult
from jetway.tasks.stage import Progress, StageContext, stage_seed
from jetway.tasks.target.session import TargetSession, open_target
from jetway.tasks.verdict import LOOKS

#: A run asks for its median alone.
LATENCY_ALONE = {
    "scenarios": ("latency",),
    "stream": None,
    "power": None,
    "profile_layers": False,
    "trtexec": False,
    "max_extensions": 1,
}
#: Most that a run is asked for: most of the noise is between processes, which only more runs can tell.
MOST_QUERIES, MOST_SECONDS = 100, 1.0


def one_run(config: BenchmarkConfig) -> BenchmarkConfig:
    """A short session of latency alone, otherwise as the recipe has it."""
    short = {
        "min_queries": min(config.min_queries, MOST_QUERIES),
        "min_duration_s": min(config.min_duration_s, MOST_SECONDS),
    }
    return config.model_copy(update=LATENCY_ALONE | short)


def measure_in_turns(
    first: StoredRun, second: StoredRun, rows: Sequence[VariantResult], budget: Budget, progress: Progress
) -> dict[tuple[str, str], DuelResult]:
    """A duel for each row, by variant and target, kept among the second run's files.

    The budget is each duel's. Raises TargetError when a target is away or lacks an engine, ConfigError when the
    second run's workload cannot be imported here.
    """
    results = {}
    for row in rows:
        engines: dict[Side, Engine] = {"champion": first.engine(row), "candidate": second.engine(row)}
        with open_target(load_target(row.target)) as session:
            result = duel_engines(
                second.context,
                session,
                engines,
                second.recipe.benchmark,
                budget=budget,
                comparisons=len(rows),
                on_run=partial(show_run, progress, row),
            )
        log_duel(first, second, row, result)
        results[row.variant, row.target] = result
    return results


def duel_engines(
    context: StageContext,
    session: TargetSession,
    engines: dict[Side, Engine],
    config: BenchmarkConfig,
    *,
    budget: Budget | None = None,
    comparisons: int = 1,
    on_run: Callable[[Sequence[DuelRun]], None] | None = None,
) -> DuelResult:
    """Champion against candidate, each run a job of its own with a lease of its own."""
    measure = partial(measure_once, context, session, engines, one_run(config))
    seed = stage_seed(context.seed, "duel")
    return duel(measure, budget=budget, comparisons=comparisons, seed=seed, on_run=on_run)


def measure_once(
    context: StageContext,
    session: TargetSession,
    engines: dict[Side, Engine],
    config: BenchmarkConfig,
    side: Side,
) -> BenchmarkResult:
    return benchmark_engines(context, session, {side: engines[side]}, config)


def show_run(progress: Progress, row: VariantResult, runs: Sequence[DuelRun]) -> None:
    """The newest run, and how many pairs count of those that a duel has at most."""
    run = runs[-1]
    figure = f"{run.p50_ms:.3f} ms" if run.validity.valid and run.p50_ms is not None else "INVALID"
    stage = f"{row.variant} in turns on {row.target}"
    progress(stage, len(counted_pairs(runs)), max(LOOKS), f"run {len(runs)}, {run.side}: {figure}")


def log_duel(first: StoredRun, second: StoredRun, row: VariantResult, result: DuelResult) -> None:
    """Beside those of earlier days: a measurement is never replaced."""
    at = f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}"
    path = f"targets/{row.target}/in_turns/{row.variant}/{at}.json"
    document = {**result.model_dump(mode="json"), "against": first.run_id, "variant": row.variant}
    second.tracker.log_json(second.run_id, path, document)
