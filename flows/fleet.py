"""The targets of a run side by side, each with its own fate: a bad one never hides a good one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import TypeVar

from httpx import HTTPError
from prefect.exceptions import PrefectException

from jetway.configs.schema import Target
from jetway.flows.pipeline import Pipeline
from jetway.flows.record import RunResult
from jetway.tasks.errors import FleetError, JetwayError, RemoteCommandError, TrackingError
from jetway.tasks.gates import gates_exit_code
from jetway.tasks.preflight import preflight
from jetway.tasks.results import TargetOutcome, TargetStatus, VariantResult, failed
from jetway.tasks.target_info import TargetInfo

logger = logging.getLogger("jetway")

T = TypeVar("T")


class Fleet:
    """Each target has threads of its own from preflight to its last measurement, so that none waits for another.

    Whatever a target raises is its own outcome, and it is left out from then on. What is no target's fault, MLflow or
    Prefect gone say, is raised.
    """

    def __init__(self, run: Pipeline, pool: ThreadPoolExecutor) -> None:
        self._run = run
        self._pool = pool
        self._lost: dict[str, JetwayError] = {}
        self._infos = {target.name: self._start(self._preflight, target) for target in run.targets}

    @property
    def targets(self) -> list[Target]:
        """Those that nothing has gone wrong with yet."""
        return [target for target in self._run.targets if target.name not in self._lost]

    def wait_for_first(self) -> None:
        """Returns as soon as one target has passed preflight. Raises when none does."""
        for future in as_completed(self._infos.values()):
            if future.exception() is None:
                return
        self._require_one()
        next(iter(self._infos.values())).result()

    def each(self, work: Callable[[Target, TargetInfo], T]) -> list[T]:
        """What the work gives on each target, those that are lost before or meanwhile left out."""
        started = [(target, self._start(partial(self._behind, work), target)) for target in self.targets]
        wait([future for _, future in started])
        return [future.result() for target, future in started if target.name not in self._lost]

    def measure(self, work: Callable[[Target, TargetInfo], T]) -> list[T]:
        """As ``each``; raises when no target gives anything."""
        measured = self.each(work)
        self._require_one()
        return measured

    def outcomes(self, rows: Sequence[VariantResult]) -> tuple[TargetOutcome, ...]:
        """How each target ended, those with a result by their judged rows."""
        return (*(self._outcome(target.name, rows) for target in self._run.targets), *self._run.skipped)

    def error(self, result: RunResult | None = None) -> JetwayError | None:
        """The error of a target that is alone, or one that lists all that are lost; None when none is."""
        if not self._lost:
            return None
        if len(self._run.targets) == 1:
            return next(iter(self._lost.values()))
        lines = "".join(f"\n  - {_indented(one.told)}" for one in failed(self.outcomes(())))
        count = f"{len(self._lost)} of {len(self._run.targets)}"
        return FleetError(f"{count} targets gave no result:{lines}", result=result)

    def _require_one(self) -> None:
        error = self.error()
        if error and not self.targets:
            raise error

    def _preflight(self, target: Target) -> TargetInfo:
        return preflight(self._run.context, target, self._run.recipe)

    def _behind(self, work: Callable[[Target, TargetInfo], T], target: Target) -> T:
        return work(target, self._infos[target.name].result())

    def _start(self, work: Callable[[Target], T], target: Target) -> Future[T]:
        return self._pool.submit(copy_context().run, self._guarded, work, target)

    def _guarded(self, work: Callable[[Target], T], target: Target) -> T:
        try:
            return work(target)
        except (TrackingError, PrefectException, HTTPError):
            raise
        except Exception as exc:
            self._lose(target, exc)
            raise

    def _lose(self, target: Target, exc: Exception) -> None:
        if target.name in self._lost:
            return
        alone = len(self._run.targets) == 1
        if not isinstance(exc, JetwayError) and not alone:
            logger.exception("%s: not expected", target.name)
            exc = RemoteCommandError(f"{target.name}: not expected: {type(exc).__name__}: {exc}")
        if isinstance(exc, JetwayError):
            self._lost[target.name] = exc
        if not alone:
            logger.warning("%s is left out, the others go on: %s", target.name, exc)

    def _outcome(self, name: str, rows: Sequence[VariantResult]) -> TargetOutcome:
        error = self._lost.get(name)
        if error is None:
            exit_code = gates_exit_code(row for row in rows if row.target == name)
            return TargetOutcome(name=name, status=TargetStatus.FINISHED, exit_code=exit_code)
        return TargetOutcome(
            name=name, status=TargetStatus.FAILED, error=str(error), exit_code=error.exit_code
        )


@contextmanager
def open_fleet(run: Pipeline) -> Iterator[Fleet]:
    """The run's targets, whose preflight starts at once."""
    # A preflight that hangs must not hold a thread that a measurement needs.
    with ThreadPoolExecutor(2 * len(run.targets), "target") as pool:
        try:
            yield Fleet(run, pool)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")
